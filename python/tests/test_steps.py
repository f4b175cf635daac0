# SPDX-License-Identifier: Apache-2.0
"""The steps alone against the oracle, and one after the other against the whole."""

from __future__ import annotations

import dataclasses
import math

import oracle
import pytest
import torch
from cases import SPARSE, Case, identifier, starts

import infllm

Place = tuple[str, torch.dtype]


def test_compress_pools_complete_windows(place: Place) -> None:
    device, dtype = place
    lengths = (31, 0, 32, 127, 128, 200)
    case = Case("windows", lengths, lengths)
    _, k, _ = case.numbers(dtype, device)
    fine, coarse, fine_starts, coarse_starts = infllm.compress(
        k, starts(lengths).to(device), max(lengths), sparse_config=case.config)
    assert fine_starts.tolist() == [0, 0, 0, 1, 7, 14, 25]
    assert coarse_starts.tolist() == [0, 0, 0, 0, 0, 1, 3]
    for pooled, begins, size, stride in ((fine, fine_starts, 32, 16),
                                         (coarse, coarse_starts, 128, 64)):
        start = 0
        for b, n in enumerate(lengths):
            true = torch.stack([oracle.pooled_keys(k[start:start + n, h].double().cpu(), size,
                                                   stride) for h in range(2)], 1)
            mine = pooled[begins[b]:begins[b + 1]].cpu()
            # One rounding of the mean, and what float32 sums lose, far below it for bf16.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(mine.double(), true, rtol=eps, atol=eps)
            start += n
        assert not pooled[begins[-1]:].any()


@pytest.mark.parametrize("case", SPARSE, ids=identifier)
def test_score_in_float64(case: Case) -> None:
    config = dataclasses.replace(case.config, score_rounding="none")
    q, k, _ = case.numbers(torch.float64)
    scores = infllm.score(q, k, **case.where(), sparse_config=config)
    group = case.heads_q // case.heads_kv
    start_q = start_k = 0
    for tokens, keys in zip(case.lengths_q, case.lengths_k, strict=True):
        for t in range(0, tokens, 13):
            position = keys - tokens + t
            own = position // 64
            for g in range(case.heads_kv):
                mine = scores[g, start_q + t]
                assert (mine[own + 1:] == -math.inf).all()
                if own + 1 <= config.budget_blocks:
                    assert (mine[:own + 1] == math.inf).all()
                    continue
                true = oracle.block_scores(q[start_q + t, g * group:(g + 1) * group],
                                           k[start_k:start_k + keys, g], position, config)
                local = config.window_size // 64 + (0 if config.legacy_window else 1)
                for b in range(own + 1):
                    if b < config.init_blocks or b > own - local:
                        assert mine[b] == math.inf
                    else:
                        assert mine[b].item() == pytest.approx(true[b], rel=1e-9)
        start_q, start_k = start_q + tokens, start_k + keys


def test_steps_are_the_whole(place: Place) -> None:
    device, dtype = place
    case = SPARSE[2]
    q, k, v = case.numbers(dtype, device)
    where = {**case.where(device), "sparse_config": case.config}
    whole, chosen = infllm.attention(q, k, v, **where, return_selection=True)
    selection = infllm.select(infllm.score(q, k, **where), **where)
    # On a GPU the fused step may break a tie of rounded scores the other way.
    if device == "cpu":
        assert torch.equal(selection, chosen)
    else:
        assert (selection == chosen).float().mean() > 0.99
    assert torch.equal(infllm.attend(q, k, v, chosen, **where), whole)


def test_select_prefers_the_lower_of_equals(device: str) -> None:
    config = infllm.SparseConfig(init_blocks=1, window_size=64, topk=3, dense_len=0)
    scores = torch.zeros(1, 640, 10, device=device)
    scores[:, :, 5] = 1
    chosen = infllm.select(scores, sparse_config=config)
    # The own block and the one before it, the sink, the best, in ascending order.
    assert chosen[0, 639].tolist() == [0, 5, 8, 9]
    assert chosen[0, 300].tolist() == [0, 1, 3, 4]
    assert chosen[0, 70].tolist() == [0, 1, -1, -1]
