# SPDX-License-Identifier: Apache-2.0
"""The published package's functions: the released pipeline, step by step, chooses what we choose."""

from __future__ import annotations

import sys

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
