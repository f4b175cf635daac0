# SPDX-License-Identifier: Apache-2.0
"""The published package's functions: the released pipeline chooses, step by step, what we do."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

import oracle
import pytest
import torch
from cases import SMALL, Case, starts

import infllm
from infllm import compat


def released_choice(q: torch.Tensor, k: torch.Tensor, lengths: tuple[int, ...],
                    config: infllm.SparseConfig) -> torch.Tensor:
    """What remote code of released checkpoints does with these functions."""
    cu = starts(lengths).to(q.device)
    longest = max(lengths)
    fine, coarse, cu_fine, cu_coarse = infllm.compress(k, cu, longest, sparse_config=config)
    fine, coarse = fine[:cu_fine[-1]], coarse[:cu_coarse[-1]]
    windows = int(cu_fine.diff().max())
    scores = compat.infllmv2_attn_stage1(q, fine, coarse, cu, cu_fine, cu_coarse, longest, windows,
                                         causal=True)
    blocks = compat.max_pooling_1d_varlen(
        scores, cu, cu_fine, torch.zeros_like(cu[1:]), longest, windows,
        local_blocks=config.window_size // 64, init_blocks=config.init_blocks)
    chosen = blocks.topk(config.columns(longest), dim=-1).indices.sort(-1).values
    own = torch.cat([torch.arange(n) for n in lengths])[:, None].to(q.device) // 64
    return torch.where(chosen <= own, chosen, -1).to(torch.int32)


def test_released_pipeline(device: str) -> None:
    lengths = (330, 280)
    case = Case("two", lengths, lengths)
    q, k, v = case.numbers(torch.bfloat16, device, grad=True)
    with torch.no_grad():
        theirs = released_choice(q, k, lengths, SMALL)
    ours = infllm.choose(q, k, **case.where(device), sparse_config=SMALL)
    # Rounded to bf16 the scores tie, and topk breaks ties as it likes.
    assert (theirs == ours).all(-1).float().mean() > 0.95
    cu = starts(lengths).to(device)
    out = compat.infllmv2_attn_varlen_func(q, k, v, cu, cu, 330, 330, causal=True, topk_idx=ours)
    assert torch.equal(out, infllm.attention(q, k, v, **case.where(device), sparse_config=SMALL))
    out.float().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def sets(selection: torch.Tensor) -> list[frozenset[int]]:
    return [frozenset(b for b in row if b >= 0) for row in selection.flatten(0, 1).tolist()]


def test_code_with_block_window_size(device: str) -> None:
    """The first release: stage 1 without a coarse set, the local blocks left to the kernel."""
    config = dataclasses.replace(SMALL, window_size=128, dense_len=0, lse_source="fine",
                                 legacy_window=True)
    tokens, topk = 420, config.topk
    q, k, v = Case("one", (tokens,), (tokens,)).numbers(torch.bfloat16, device)
    cu, own = starts((tokens,)).to(device), torch.arange(tokens, device=device)[:, None] // 64
    fine, _, cu_fine, _ = infllm.compress(k, sparse_config=config)
    fine = fine[:cu_fine[-1]]
    compat.install("early", block_window=True)
    early = sys.modules.pop("early")
    scores = early.infllmv2_attn_stage1(q, fine, fine.clone(), cu_seqlens_q=cu,
                                        cu_seqlens_k=cu_fine, max_seqlen_q=tokens,
                                        max_seqlen_k=fine.shape[0], causal=True)
    blocks = early.max_pooling_1d(scores, cache_len=0, local_blocks=2, init_blocks=1)
    chosen = torch.sort(blocks, stable=True, descending=True).indices[..., :topk].sort(-1).values
    chosen = torch.where(chosen < own, chosen, -1).to(torch.int32)
    out = early.infllmv2_attn_varlen_func(q, k, v, cu, cu, tokens, tokens, causal=True,
                                          topk_idx=chosen, block_window_size=2)
    expected, ours = infllm.attention(q, k, v, sparse_config=config, return_selection=True)
    rows = compat._over_blocks(chosen, own[:, 0] * 64, tokens, 2)["selection"]
    same = torch.tensor([a == b for a, b in zip(sets(rows), sets(ours), strict=True)])
    same = same.view(2, tokens).all(0)
    assert same.float().mean() > 0.95  # both break ties alike; sums are in another order
    # A list with more columns may be summed in another order.
    eps = torch.finfo(q.dtype).eps
    assert (out - expected)[same].abs().max() <= 2 * eps * expected.abs().max()

    last = early.infllmv2_attn_with_kvcache(
        q[None, -1:], k[None], v[None], cache_seqlens=tokens, topk_idx=chosen[:, -1:],
        block_window_size=2, cache_batch_idx=torch.zeros(1, dtype=torch.int32, device=device))
    assert (last[0, 0] - out[-1]).abs().max() <= 2 * eps * out.abs().max()


def test_code_of_the_other_kind_is_refused() -> None:
    q = torch.randn(4, 2, 16)
    cu, index = starts((4,)), torch.zeros(2, 4, 1, dtype=torch.int32)
    for block_window in (False, True):
        compat.install("some", block_window=block_window)
        some = sys.modules.pop("some")
        window = 0 if block_window else 32
        with pytest.raises(NotImplementedError, match=rf"install\(block_window={not block_window}"):
            some.infllmv2_attn_varlen_func(q, q, q, cu, cu, 4, 4, causal=True, topk_idx=index,
                                           block_window_size=window)
        some.infllmv2_attn_varlen_func(q, q, q, cu, cu, 4, 4, causal=True)
    with pytest.raises(TypeError, match="cu_seqlens_v: 4, expected a tensor"):
        compat.infllmv2_attn_stage1(q, q, q, cu, cu, 4, 4)


def test_cache_rows() -> None:
    q, k, v = torch.randn(2, 1, 2, 16), torch.randn(3, 70, 2, 16), torch.randn(3, 70, 2, 16)
    out = compat.infllmv2_attn_with_kvcache(q, k, v, cache_seqlens=65,
                                            cache_batch_idx=torch.tensor([2, 0]))
    for b, owner in enumerate((2, 0)):
        assert torch.equal(out[b], infllm.attention(q[b], k[owner, :65], v[owner, :65]))


def test_stage1_against_the_oracle() -> None:
    config = infllm.SparseConfig(window_size=64, topk=3, dense_len=0, score_rounding="none",
                                 init_blocks=0)
    q, k = torch.randn(400, 4, 16), torch.randn(400, 2, 16)
    fine, coarse, cu_fine, cu_coarse = infllm.compress(k, sparse_config=config)
    cu = starts((400,))
    scores = compat.infllmv2_attn_stage1(q, fine[:cu_fine[-1]], coarse[:cu_coarse[-1]], cu,
                                         cu_fine, cu_coarse, 400, int(cu_fine[-1]), causal=True)
    blocks = compat.max_pooling_1d(scores, 0, 1, 0)
    for t in (127, 128, 300, 399):
        for g in range(2):
            true = oracle.block_scores(q[t, 2 * g:2 * g + 2].double(), k[:, g].double(), t, config)
            mine = blocks[g, t].tolist()
            own = t // 64
            assert mine[own] == mine[own - 1] == float("inf")
            assert mine[:own - 1] == pytest.approx(true[:own - 1], rel=1e-4)
            assert all(x == -float("inf") for x in mine[own + 1:])


@pytest.mark.parametrize("paged", [False, True])
def test_with_kvcache(device: str, paged: bool) -> None:
    dtype = torch.bfloat16
    k_all, v_all = (torch.randn(2, 320, 2, 64).to(device, dtype) for _ in range(2))
    q = torch.randn(2, 1, 4, 64).to(device, dtype)
    held = torch.tensor([300, 130], dtype=torch.int32, device=device)
    k_new, v_new = (torch.stack([x[b, n:n + 1] for b, n in enumerate(held.tolist())])
                    for x in (k_all, v_all))
    k_cache, v_cache = (x.clone() for x in (k_all, v_all))
    for b, n in enumerate(held.tolist()):
        k_cache[b, n:] = v_cache[b, n:] = 0
    table = None
    if paged:
        k_cache, v_cache = (x.view(10, 64, 2, 64) for x in (k_cache, v_cache))
        table = torch.arange(10, dtype=torch.int32, device=device).view(2, 5)
    out, lse = compat.infllmv2_attn_with_kvcache(
        q, k_cache, v_cache, k_new, v_new, cache_seqlens=held, block_table=table,
        return_softmax_lse=True)
    assert torch.equal(k_cache.reshape(2, 320, 2, 64)[0, 300], k_all[0, 300])
    assert lse.shape == (2, 4, 1)
    for b, n in enumerate(held.tolist()):
        expected = infllm.attention(q[b], k_all[b, :n + 1], v_all[b, :n + 1])
        assert (out[b] - expected).abs().max() <= 2 * torch.finfo(dtype).eps


def test_bit_rows() -> None:
    index = torch.tensor([[[0, 5, 63, 64, -1], [70, -1, -1, -1, -1]]], dtype=torch.int32)
    rows, blocks = compat.topk_to_uint64(index, 71 * 64, 64)
    assert blocks == 71 and rows.shape == (1, 2, 2)
    assert rows[0, 0].tolist() == [1 + 32 - 2**63, 1] and rows[0, 1].tolist() == [0, 64]
    mask = compat.uint64_to_bool(rows, 71)
    assert mask[0, 0].nonzero().flatten().tolist() == [0, 5, 63, 64]
    assert torch.equal(compat.blockmask_to_uint64(mask)[0], rows)


def test_refused_options() -> None:
    q = torch.randn(4, 2, 16)
    cu = starts((4,))
    for options in ({"dropout_p": 0.1}, {"window_size": (4, 4)}, {"softcap": 1.0},
                    {"causal": False}, {"alibi_slopes": torch.ones(2)}):
        with pytest.raises(NotImplementedError, match=next(iter(options))):
            compat.infllmv2_attn_varlen_func(q, q, q, cu, cu, 4, 4, **{"causal": True, **options})


# What the published package takes, in its order.
ORDER = {
    "infllmv2_attn_varlen_func":
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal "
        "window_size softcap alibi_slopes deterministic return_attn_probs block_table topk_idx",
    "infllmv2_attn_stage1":
        "q k v cu_seqlens_q cu_seqlens_k cu_seqlens_v max_seqlen_q max_seqlen_k dropout_p "
        "softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs "
        "block_table",
    "infllmv2_attn_with_kvcache":
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
        "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes "
        "num_splits return_softmax_lse topk_idx",
    "max_pooling_1d": "input cache_len local_blocks init_blocks block_size stride",
    "max_pooling_1d_varlen":
        "input cu_seqlens_q cu_seqlens_k cache_lens max_seqlen_q max_seqlen_k local_blocks "
        "init_blocks block_size stride",
    "topk_to_uint64": "topk_idx max_seqlen_k block_size memory_buffer",
    "blockmask_to_uint64": "blockmask",
    "uint64_to_bool": "uint64_array last_dim_size",
}


@pytest.mark.parametrize("name", ORDER)
def test_argument_order(name: str) -> None:
    names = list(inspect.signature(getattr(compat, name)).parameters)
    expected = ORDER[name].split()
    assert names[:len(expected)] == expected


@pytest.mark.parametrize(("change", "message"), [
    ({"cache_seqlens": 17}, "cache_seqlens: 17 keys and 0 new ones, but k_cache has room for 16"),
    ({"cache_seqlens": torch.ones(2)}, "cache_seqlens: 2 lengths, expected 1"),
    ({"q": torch.zeros(1, 2, 16)}, r"q and k_cache: \[1, 2, 16\] and \[1, 16, 2, 16\], expected"),
    ({"topk_idx": torch.zeros(2, 9, 1)}, r"topk_idx: \[2, 9, 1\], expected \[2, 1, K\]"),
    ({"rotary_cos": torch.zeros(3)}, "rotary_cos = a tensor, expected None"),
])
def test_refused_steps(change: dict[str, Any], message: str) -> None:
    cache = torch.zeros(1, 16, 2, 16)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        compat.infllmv2_attn_with_kvcache(**{"q": cache[:, :1], "k_cache": cache, "v_cache": cache,
                                             "cache_seqlens": 16, **change})


def test_alias() -> None:
    assert "infllm_v2" not in sys.modules
    compat.install()
    try:
        import importlib.util

        import infllm_v2
        assert infllm_v2.infllmv2_attn_stage1 is compat.infllmv2_attn_stage1
        assert importlib.util.find_spec("infllm_v2") is not None
    finally:
        del sys.modules["infllm_v2"]
