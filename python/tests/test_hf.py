# SPDX-License-Identifier: Apache-2.0
"""transformers: a tiny random model gives with our attention what it gives with its own."""

from __future__ import annotations

import pytest
import torch

import infllm

transformers = pytest.importorskip("transformers")
from infllm.integrations import hf


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    hf.register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        pad_token_id=0, eos_token_id=None)
    return transformers.LlamaForCausalLM(config).eval()


def logits(model: torch.nn.Module, implementation: str, **inputs: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs).logits


def test_dense_forward_is_sdpa(model: torch.nn.Module) -> None:
    ids = torch.randint(1, 64, (2, 90))
    torch.testing.assert_close(logits(model, "infllm", input_ids=ids),
                               logits(model, "sdpa", input_ids=ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: torch.nn.Module, side: str) -> None:
    ids = torch.randint(1, 64, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, (slice(0, 15) if side == "left" else slice(25, 40))] = 0
    ours = logits(model, "infllm", input_ids=ids, attention_mask=mask)
    theirs = logits(model, "sdpa", input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-4)


def test_generate(model: torch.nn.Module) -> None:
    ids = torch.randint(1, 64, (1, 70))
    outputs = []
    for implementation in ("infllm", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs.append(model.generate(ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(*outputs)


def test_gradients(model: torch.nn.Module) -> None:
    ids = torch.randint(1, 64, (1, 70))
    grads = []
    for implementation in ("infllm", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def test_sparse_config_is_followed(model: torch.nn.Module) -> None:
    ids = torch.randint(1, 64, (1, 500))
    dense = logits(model, "infllm", input_ids=ids)
    try:
        hf.set_sparse_config(model, infllm.SparseConfig(window_size=64, topk=2, dense_len=256))
        sparse = logits(model, "infllm", input_ids=ids)
        hf.set_sparse_config(model, infllm.SparseConfig(topk=64, dense_len=256))
        every = logits(model, "infllm", input_ids=ids)
    finally:
        hf.set_sparse_config(model, None)
    assert not torch.allclose(sparse, dense, atol=1e-4)
    torch.testing.assert_close(every, dense, rtol=1e-4, atol=1e-4)
