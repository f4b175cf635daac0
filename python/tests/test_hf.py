# SPDX-License-Identifier: Apache-2.0
"""transformers: a tiny random model gives with our attention what it gives with its own."""

from __future__ import annotations

import copy
import pathlib

import pytest
import torch
from cases import SMALL

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


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_by_positions(model: torch.nn.Module, batch: int) -> None:
    """Positions that begin anew separate sequences; each layer and a second look agree."""
    ids = torch.randint(1, 64, (batch, 90))
    for lengths in ((40, 50), (1, 30, 59), (90,)):
        places = torch.cat([torch.arange(n) for n in lengths])[None].expand(batch, -1)
        for _ in range(2):
            ours = logits(model, "infllm", input_ids=ids, position_ids=places, use_cache=False)
        alone = torch.cat([logits(model, "sdpa", input_ids=part)
                           for part in ids.split(lengths, dim=1)], 1)
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)


def test_positions_written_anew_are_looked_at_anew(model: torch.nn.Module) -> None:
    ids = torch.randint(1, 64, (1, 60))
    places = torch.arange(60)[None]
    whole = logits(model, "infllm", input_ids=ids, position_ids=places, use_cache=False)
    places[:, 20:] -= 20
    packed = logits(model, "infllm", input_ids=ids, position_ids=places, use_cache=False)
    torch.testing.assert_close(packed[:, 20:], logits(model, "sdpa", input_ids=ids[:, 20:]),
                               rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[:, :20], whole[:, :20], rtol=1e-4, atol=1e-4)


def test_packed_and_compiled_is_refused(model: torch.nn.Module) -> None:
    ids = torch.randint(1, 64, (1, 60))
    model = copy.deepcopy(model)
    model.model.layers = model.model.layers[:1]
    model.set_attn_implementation("infllm")
    step = torch.compile(lambda places: model(input_ids=ids, position_ids=places, use_cache=False)
                         .logits, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(step(torch.arange(60)[None]), model(input_ids=ids).logits)
        with pytest.raises(RuntimeError, match="position_ids: they begin anew"):
            step((torch.arange(60) % 30)[None])


def test_static_cache(model: torch.nn.Module) -> None:
    ids = torch.randint(1, 64, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    outputs = []
    for implementation in ("infllm", "sdpa"):
        model.set_attn_implementation(implementation)
        outputs += [model.generate(x, attention_mask=m, max_new_tokens=6, do_sample=False,
                                   cache_implementation="static", disable_compile=True)
                    for x, m in ((ids, mask), (ids[:1], mask[:1]))]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])


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


def test_sparse_config_is_saved(model: torch.nn.Module, tmp_path: pathlib.Path) -> None:
    ids = torch.randint(1, 64, (1, 300))
    model.set_attn_implementation("infllm")
    hf.set_sparse_config(model, SMALL)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="infllm")
    assert hf.sparse_config_of(again) == SMALL
    with torch.no_grad():
        sparse = model(ids).logits
        assert torch.equal(again(ids).logits, sparse)
        hf.set_sparse_config(model, None)
        assert not torch.equal(model(ids).logits, sparse)
    with pytest.raises(TypeError, match="sparse_config: dict, expected infllm.SparseConfig"):
        hf.set_sparse_config(model, {"topk": 3})


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
