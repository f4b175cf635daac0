# SPDX-License-Identifier: Apache-2.0
"""The patch for MiniCPM4's remote code, on a model with its attributes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from infllm.integrations import minicpm4
from remote_code import Attention, Cache, CacheBeforeRope, Model, apply_rotary_pos_emb
from torch import Tensor, nn

import infllm

SPARSE = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64,
          "window_size": 64, "topk": 3, "use_nope": False, "dense_len": 256}


@pytest.fixture
def model() -> Model:
    return Model(sparse_config=SPARSE).eval()


def in_steps(model: Model, x: Tensor, first: int, cache: Cache, **rest: Any) -> Tensor:
    """The first tokens at once, the others one by one."""
    parts = [x[:, :first], *x[:, first:].split(1, 1)]
    return torch.cat([model(part, past_key_values=cache, **rest) for part in parts], 1)


def close(left: Tensor, right: Tensor) -> None:
    """Equal but for the order of sums in float32, over rows of a few hundred terms."""
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dense_is_the_models_own_attention(model: Model) -> None:
    x = torch.randn(2, 200, 64)
    own = model(x)
    own_steps = in_steps(model, x, 190, Cache(2))
    assert minicpm4.patch(model) is model
    close(model(x), own)
    close(in_steps(model, x, 190, Cache(2)), own_steps)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: Model, side: str) -> None:
    x = torch.randn(2, 120, 64)
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[1, (slice(0, 50) if side == "left" else slice(70, 120))] = 0
    own = model(x, mask)
    minicpm4.patch(model)
    close(model(x, mask)[mask.bool()], own[mask.bool()])
    # Written to in place, the same mask says something else.
    mask.fill_(1)
    close(model(x, mask), model(x))


@torch.no_grad()
def test_sparse_config_is_followed(model: Model) -> None:
    x = torch.randn(1, 400, 64)
    dense = model(x)
    minicpm4.patch(model)
    sparse = model(x)
    layer = model.layers[0]
    assert (sparse - dense).abs().max() > 1e-3
    q, k, v = (p(x).view(400, -1, 16) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    cos, sin = layer.rotary_emb(x, 400)
    q, k = (y[0].transpose(0, 1) for y in apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin, torch.arange(400)[None]))
    out = infllm.attention(q, k, v, sparse_config=infllm.SparseConfig.from_dict(SPARSE))
    close(layer(x, position_ids=torch.arange(400)[None])[0], layer.o_proj(out.flatten(1))[None])
    minicpm4.patch(model, infllm.SparseConfig(topk=64, dense_len=0))
    close(model(x), dense)


@torch.no_grad()
def test_decoding_crosses_dense_len(model: Model) -> None:
    x = torch.randn(1, 300, 64)
    minicpm4.patch(model)
    steps = in_steps(model, x, 240, Cache(2))
    for length in (250, 256, 300):  # dense below 256; a prefix of a sparse input is not
        close(steps[:, length - 1], model(x[:, :length])[:, -1])


@torch.no_grad()
def test_use_nope_scores_from_before_rope() -> None:
    model = Model(sparse_config={**SPARSE, "use_nope": True}, layers=1).eval()
    x = torch.randn(2, 300, 64)
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, :20] = 0
    minicpm4.patch(model)
    whole = model(x, mask)
    cache = CacheBeforeRope(1)
    first = model(x[:, :290], mask[:, :290], past_key_values=cache)
    rest = [model(x[:, t:t + 1], mask[:, :t + 1], past_key_values=cache) for t in range(290, 300)]
    close(torch.cat([first, *rest], 1)[mask.bool()], whole[mask.bool()])
    plain = Model(sparse_config=SPARSE, layers=1).eval()
    plain.load_state_dict(model.state_dict())
    assert (minicpm4.patch(plain)(x, mask) - whole).abs().max() > 1e-3
    with pytest.raises(NotImplementedError, match="Cache keeps no keys from before RoPE"):
        model(x, past_key_values=Cache(1))


@torch.no_grad()
@pytest.mark.cuda
def test_on_a_gpu() -> None:
    """At most twice as far from float32 as the model's own attention in bfloat16 is."""
    model = Model(layers=1, hidden=256).eval()
    x = torch.randn(2, 300, 256).bfloat16()
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, :40] = 0
    true = model.bfloat16().float()(x.float(), mask)[mask.bool()]
    model.bfloat16().cuda()
    x, mask = x.cuda(), mask.cuda()
    own = (model(x, mask)[mask.bool()].cpu() - true).abs().max()
    minicpm4.patch(model)
    whole = model(x, mask)[mask.bool()].cpu()
    cache = Cache(1)
    steps = [model(x[:, a:b], mask[:, :b], past_key_values=cache)
             for a, b in ((0, 298), (298, 299), (299, 300))]
    for ours in (whole, torch.cat(steps, 1)[mask.bool()].cpu()):
        assert (ours - true).abs().max() <= 2 * own + torch.finfo(x.dtype).eps * true.abs().max()


def test_gradients(model: Model) -> None:
    x = torch.randn(1, 200, 64)
    grads = []
    for change in (minicpm4.unpatch, minicpm4.patch):
        change(model)
        model.zero_grad()
        model.train()(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for own, ours in zip(*grads, strict=True):
        assert (ours - own).norm() <= 1e-4 * own.norm()


def test_unpatch_leaves_no_trace(model: Model) -> None:
    def state(m: nn.Module) -> list[Any]:
        return [(dict(x.__dict__), len(x._forward_pre_hooks)) for x in m.modules()
                if isinstance(x, (Attention, Model))]

    before = [(set(d), n) for d, n in state(model)]
    minicpm4.patch(minicpm4.patch(model))
    assert model._use_flash_attention_2 and not model._use_sdpa
    minicpm4.unpatch(model)
    assert [(set(d), n) for d, n in state(model)] == before
    assert model._use_sdpa and not model._use_flash_attention_2
    minicpm4.unpatch(model)


def test_what_is_not_covered_is_refused(model: Model) -> None:
    x = torch.randn(1, 8, 64)
    with pytest.raises(ValueError, match='Sequential has no module with.*attn_implementation='):
        minicpm4.patch(nn.Sequential(nn.Linear(4, 4)))
    for change, message in (
            (lambda a: setattr(a, "o_gate", nn.Linear(4, 4)), "Attention: has o_gate"),
            (lambda a: setattr(a.config, "pretraining_tp", 2), "pretraining_tp = 2, expected 1"),
            (lambda a: delattr(a, "head_dim"), "Attention: no head_dim"),
            (lambda a: setattr(a, "rotary_emb", nn.Identity()), "rotary_emb takes no seq_len")):
        other = Model()
        change(other.layers[1])
        with pytest.raises(NotImplementedError, match=message):
            minicpm4.patch(other)
        other.layers[0](x, position_ids=torch.arange(8)[None])  # half a patch is none
        assert "forward" not in other.layers[0].__dict__
    minicpm4.patch(model)
    layer = model.layers[0]
    where = {"position_ids": torch.arange(8)[None]}
    with pytest.raises(NotImplementedError, match="output_attentions = True"):
        layer(x, output_attentions=True, **where)
    with pytest.raises(NotImplementedError, match=r"attention_mask: \[1, 1, 8, 8\], expected that"):
        layer(x, torch.zeros(1, 1, 8, 8), **where)
    layer.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match="attention_dropout = 0.1"):
        layer.train()(x, **where)
