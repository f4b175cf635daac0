# SPDX-License-Identifier: Apache-2.0
"""infllm.attention against the oracle: values, choice and gradients.

The bound on an error is derived, not chosen (docs/numerics.md): at most twice the error of the same
computation rounded where an honest kernel rounds, plus one rounding of the result.
"""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
from cases import ALL, DENSE, SPARSE, Case, identifier
from torch import Tensor

import infllm

Place = tuple[str, torch.dtype]


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def yardstick(case: Case, inputs: list[Tensor], chosen: Tensor | None, dtype: torch.dtype,
              grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Output, log-sum-exp and gradients in float64, rounded where an honest kernel rounds."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    out, lse = infllm.attention(q, k, v, **case.where(), sparse_config=case.config,
                                selection=chosen, return_lse=True, backend=f"reference:{short}")
    return [out, lse, *torch.autograd.grad((out, lse), (q, k, v), grads)]


def bound(error: float, values: Tensor, dtype: torch.dtype) -> float:
    return 2 * error + torch.finfo(dtype).eps * largest(values)


@pytest.mark.parametrize("case", ALL, ids=identifier)
def test_values_and_gradients(case: Case, place: Place) -> None:
    device, dtype = place
    q, k, v = case.numbers(dtype, device, grad=True)
    out, lse, chosen = infllm.attention(q, k, v, **case.where(device), sparse_config=case.config,
                                        return_lse=True, return_selection=True)
    grad_out = torch.randn(out.shape).to(device, dtype)
    grad_lse = torch.randn(lse.shape).to(device, lse.dtype)
    ours = [out, lse, *torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse))]

    inputs = [x.detach().cpu().requires_grad_() for x in (q, k, v)]
    chosen = chosen.cpu() if chosen.shape[2] else None
    upstream = (grad_out.cpu().double(), grad_lse.cpu().double())
    out, lse = oracle.batch(*inputs, list(case.lengths_q), list(case.lengths_k), chosen,
                            case.sparse)
    true = [out, lse, *torch.autograd.grad((out, lse), inputs, upstream)]
    rounded = yardstick(case, inputs, chosen, dtype, upstream)
    for mine, exact, other in zip(ours, true, rounded, strict=True):
        assert largest(mine.cpu() - exact) <= bound(largest(other - exact), exact, dtype)


def test_one_token_gets_its_value(place: Place) -> None:
    device, dtype = place
    q, k, v = Case("one", (1, 1), (1, 1), config=None).numbers(dtype, device)
    out = infllm.attention(q[:1], k[:1], v[:1])
    assert torch.equal(out[0], v[0].repeat_interleave(2, 0))


@pytest.mark.parametrize("case", SPARSE, ids=identifier)
def test_choice_in_float64(case: Case) -> None:
    """The reference chooses the oracle's blocks; compared in full precision there are no ties."""
    config = dataclasses.replace(case.config, score_rounding="none")
    q, k, v = case.numbers(torch.float64)
    _, chosen = infllm.attention(q, k, v, **case.where(), sparse_config=config,
                                 return_selection=True)
    start_q = start_k = 0
    for tokens, keys, sparse in zip(case.lengths_q, case.lengths_k, case.sparse, strict=True):
        if sparse:
            expected = oracle.selection(q[start_q:start_q + tokens], k[start_k:start_k + keys],
                                        config, chosen.shape[2])
            assert torch.equal(chosen[:, start_q:start_q + tokens], expected)
        elif chosen.shape[2]:
            assert (chosen[:, start_q:start_q + tokens] == -1).all()
        start_q, start_k = start_q + tokens, start_k + keys


@pytest.mark.parametrize("case", SPARSE, ids=identifier)
def test_choice_by_value(case: Case, place: Place) -> None:
    """Every chosen block's true score reaches the last chosen one's, but for what rounding to
    bf16 and the column's own error may do; forced blocks are there; rows ascend."""
    device, dtype = place
    config = case.config
    q, k, _ = case.numbers(dtype, device)
    chosen = infllm.choose(q, k, **case.where(device), sparse_config=config).cpu()
    q, k = q.double().cpu(), k.double().cpu()
    group = case.heads_q // case.heads_kv
    start_q = start_k = 0
    for tokens, keys, sparse in zip(case.lengths_q, case.lengths_k, case.sparse, strict=True):
        for t in range(0, tokens if sparse else 0, 17):
            for g in range(case.heads_kv):
                heads = q[start_q + t, g * group:(g + 1) * group]
                position = keys - tokens + t
                ours = [b for b in chosen[g, start_q + t].tolist() if b >= 0]
                theirs = oracle.chosen_blocks(heads, k[start_k:start_k + keys, g], position,
                                              config)
                assert ours == sorted(set(ours)) and len(ours) == len(theirs)
                scores = oracle.block_scores(heads, k[start_k:start_k + keys, g], position, config)
                lowest = min((scores[b] for b in theirs if b not in ours), default=0)
                # bf16 halves its last place, pooled keys are rounded once, dot products sum up.
                budget = 3 * torch.finfo(torch.bfloat16).eps * (1 + max(map(abs, scores)))
                assert all(scores[b] >= lowest - budget for b in ours if b not in theirs)
        start_q, start_k = start_q + tokens, start_k + keys


@pytest.mark.parametrize("case", [c for c in DENSE if 0 not in c.lengths_q], ids=identifier)
def test_dense_is_torch_attention(case: Case, place: Place) -> None:
    device, dtype = place
    q, k, v = case.numbers(dtype, device)
    ours = infllm.attention(q, k, v, **case.where(device))
    start_q = start_k = 0
    for tokens, keys in zip(case.lengths_q, case.lengths_k, strict=True):
        qs, ks, vs = (x.transpose(0, 1)[None] for x in (
            q[start_q:start_q + tokens], k[start_k:start_k + keys], v[start_k:start_k + keys]))
        seen = torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)
        attend = torch.nn.functional.scaled_dot_product_attention
        theirs = attend(qs, ks, vs, seen, enable_gqa=True)
        true = attend(qs.double(), ks.double(), vs.double(), seen, enable_gqa=True)
        mine = ours[start_q:start_q + tokens].transpose(0, 1)[None]
        assert largest(mine - true) <= bound(largest(theirs - true), true, dtype)
        start_q, start_k = start_q + tokens, start_k + keys


def test_sparse_with_every_block_is_dense(place: Place) -> None:
    device, dtype = place
    case = Case("all", (200, 30), (330, 30), config=None)
    wide = infllm.SparseConfig(topk=64, dense_len=0)
    q, k, v = case.numbers(dtype, device, grad=True)
    dense = infllm.attention(q, k, v, **case.where(device))
    sparse, chosen = infllm.attention(q, k, v, **case.where(device), sparse_config=wide,
                                      return_selection=True)
    assert chosen.shape[2] == 6
    grad_out = torch.randn_like(dense)
    pairs = zip(torch.autograd.grad(dense, (q, k, v), grad_out),
                torch.autograd.grad(sparse, (q, k, v), grad_out), strict=True)
    eps = torch.finfo(dtype).eps
    assert largest(dense - sparse) <= 2 * eps * largest(dense)
    for left, right in pairs:
        assert largest(left - right) <= 4 * eps * (1 + largest(left))


def test_a_given_selection_is_used(place: Place) -> None:
    device, dtype = place
    case = SPARSE[4]
    q, k, v = case.numbers(dtype, device, grad=True)
    rest = {**case.where(device), "sparse_config": case.config}
    chosen = infllm.choose(q, k, **rest)
    once, first = infllm.attention(q, k, v, **rest, return_selection=True)
    again, second = infllm.attention(q, k, v, **rest, selection=chosen, return_selection=True)
    assert torch.equal(first, chosen) and second is chosen
    assert torch.equal(once, again)
    own = torch.full_like(chosen, -1)
    position = torch.cat([torch.arange(n - m, n) for m, n in
                          zip(case.lengths_q, case.lengths_k, strict=True)])
    own[:, :, 0] = (position // 64).to(device)
    narrow = infllm.attention(q, k, v, **rest, selection=own)
    true, _ = oracle.batch(*(x.detach().cpu() for x in (q, k, v)), list(case.lengths_q),
                           list(case.lengths_k), own.cpu(), case.sparse)
    assert largest(narrow.cpu() - true) <= 4 * torch.finfo(dtype).eps * largest(true)


def test_batched_is_packed(place: Place) -> None:
    device, dtype = place
    q, k, v = (torch.randn(2, 70, heads, 64).to(device, dtype) for heads in (4, 2, 2))
    plan = infllm.make_plan(torch.tensor([0, 70, 140], dtype=torch.int32, device=device), None, 70,
                            70)
    packed = infllm.attention(*(x.flatten(0, 1) for x in (q, k, v)), plan=plan)
    assert torch.equal(infllm.attention(q, k, v).flatten(0, 1), packed)


def test_packed_sequences_do_not_meet(place: Place) -> None:
    """A batch gives bitwise what its sequences give alone."""
    device, dtype = place
    case = SPARSE[3]
    q, k, v = case.numbers(dtype, device)
    together = infllm.attention(q, k, v, **case.where(device), sparse_config=case.config)
    start = 0
    for n in case.lengths_q:
        rows = slice(start, start + n)
        alone = infllm.attention(q[rows], k[rows], v[rows], sparse_config=case.config)
        assert torch.equal(alone, together[rows])
        start += n


def test_the_switch_can_be_told(place: Place) -> None:
    device, dtype = place
    case = Case("short", (300, 300), (300, 300))
    q, k, v = case.numbers(dtype, device)
    where = case.where(device)
    dense = infllm.attention(q, k, v, **where)
    sparse = infllm.attention(q, k, v, **where, sparse_config=case.config)
    told = infllm.attention(q, k, v, **where, sparse_config=case.config, sparse=torch.tensor(
        [True, False], device=device))
    assert torch.equal(told[:300], sparse[:300])
    # A GPU takes a dense sequence among sparse ones through the kernel of the sparse ones.
    room = 4 * torch.finfo(dtype).eps * largest(dense) if device == "cuda" else 0
    assert largest(told[300:] - dense[300:]) <= room
    assert torch.equal(dense, infllm.attention(q, k, v, **where, sparse_config=case.config,
                                               sparse=False))
    assert not torch.equal(dense, sparse)


def test_repeats_bitwise(place: Place) -> None:
    device, dtype = place
    case = SPARSE[4]
    q, k, v = case.numbers(dtype, device, grad=True)
    results = []
    for _ in range(5):
        out, lse = infllm.attention(q, k, v, **case.where(device), sparse_config=case.config,
                                    return_lse=True)
        results.append((out, lse, *torch.autograd.grad((out, lse), (q, k, v),
                                                       (out.detach(), lse.detach()))))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_use_nope_scores_with_what_it_is_told(place: Place) -> None:
    device, dtype = place
    case = SPARSE[2]
    config = dataclasses.replace(case.config, use_nope=True)
    q, k, v = case.numbers(dtype, device)
    q_score, k_score, _ = case.numbers(dtype, device, seed=1)
    out, chosen = infllm.attention(q, k, v, sparse_config=config, q_score=q_score, k_score=k_score,
                                   return_selection=True)
    assert torch.equal(chosen, infllm.choose(q_score, k_score, sparse_config=case.config))
    assert torch.equal(out, infllm.attention(q, k, v, sparse_config=config, selection=chosen))


@pytest.mark.parametrize("case", [DENSE[3], SPARSE[4]], ids=identifier)
def test_gradcheck(case: Case) -> None:
    """Finite differences of the reference, through the output and the log-sum-exp."""
    small = dataclasses.replace(case, heads_q=2, heads_kv=1, head_dim=4,
                                lengths_q=(2, 1), lengths_k=(70, 260))
    q, k, v = small.numbers(torch.float64, grad=True)
    # The choice is a constant: hold it, as the gradient does.
    rest = {**small.where(), "sparse_config": small.config}
    if small.config is not None:
        rest["selection"] = infllm.choose(q, k, **rest)
    assert torch.autograd.gradcheck(
        lambda *x: infllm.attention(*x, **rest, return_lse=True), (q, k, v), atol=1e-6,
        fast_mode=True)
