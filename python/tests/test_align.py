# SPDX-License-Identifier: Apache-2.0
"""The selection-alignment loss against its equations, with gradients of PyTorch's own."""

from __future__ import annotations

import dataclasses

import oracle
import pytest
import torch
from cases import SMALL, Case, starts
from torch import Tensor

import infllm

Place = tuple[str, torch.dtype]
CASE = Case("two", (60, 5), (300, 330), heads_q=4, heads_kv=2)


def true_loss(q: Tensor, k: Tensor, position: int, config: infllm.SparseConfig) -> Tensor:
    """Of one token and KV head: q [G, D], k [S, D], differentiable."""
    scale = oracle.float32_scale(q.shape[1])
    own = position // 64
    first_local = max(0, own - config.window_size // 64)
    seen = k[:position + 1]
    fine = oracle.pooled_keys(seen, 32, 16)
    coarse = oracle.pooled_keys(seen, 128, 64)
    x = scale * q @ fine.T - torch.logsumexp(scale * q @ coarse.T, 1, keepdim=True)
    s = torch.logsumexp(x, 0)
    blocks = [b for b in range(config.init_blocks, first_local) if max(0, 4 * b - 1) < len(fine)]
    if not blocks:
        return q.sum() * 0
    best = torch.stack([s[max(0, 4 * b - 1):4 * b + 4].max() for b in blocks])
    with torch.no_grad():
        attention = torch.softmax(scale * q @ seen.T, 1).mean(0)
        target = torch.stack([attention[64 * b:64 * b + 64].sum() for b in blocks])
    return -(target * torch.log_softmax(best, 0)).sum()


def true_losses(q: Tensor, k: Tensor, case: Case, config: infllm.SparseConfig) -> Tensor:
    group = case.heads_q // case.heads_kv
    result = []
    for g in range(case.heads_kv):
        row = []
        start_q = start_k = 0
        for tokens, keys in zip(case.lengths_q, case.lengths_k, strict=True):
            for t in range(tokens):
                row.append(true_loss(q[start_q + t, g * group:(g + 1) * group],
                                     k[start_k:start_k + keys, g], keys - tokens + t, config))
            start_q, start_k = start_q + tokens, start_k + keys
        result.append(torch.stack(row))
    return torch.stack(result)


def test_the_equations() -> None:
    # Tokens with two blocks to choose from, with three, and with one: nothing to learn.
    case = Case("three", (12, 5, 5), (300, 330, 250))
    q, k, _ = case.numbers(torch.float64, grad=True)
    loss = infllm.selection_alignment_loss(q, k, **case.where(), sparse_config=SMALL)
    true = true_losses(q, k, case, SMALL)
    torch.testing.assert_close(loss, true, rtol=1e-9, atol=1e-12)
    upstream = torch.rand_like(loss)
    for mine, exact in zip(torch.autograd.grad(loss, (q, k), upstream),
                           torch.autograd.grad(true, (q, k), upstream), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-7, atol=1e-10)


def test_every_device_agrees_with_the_reference(place: Place) -> None:
    device, dtype = place
    q, k, _ = CASE.numbers(dtype, device, grad=True)
    loss = infllm.selection_alignment_loss(q, k, **CASE.where(device), sparse_config=SMALL)
    # A mean's gradients would be too small for float16.
    grads = torch.autograd.grad(loss.sum(), (q, k))
    exact_q, exact_k = (x.detach().double().cpu().requires_grad_() for x in (q, k))
    exact = infllm.selection_alignment_loss(exact_q, exact_k, **CASE.where(), sparse_config=SMALL)
    # Pooled keys are rounded once to the cache's type: a relative error of logits below 10.
    room = 16 * torch.finfo(dtype).eps
    assert (loss.cpu() - exact).abs().max() <= room * exact.abs().max()
    for mine, true in zip(grads, torch.autograd.grad(exact.sum(), (exact_q, exact_k)),
                          strict=True):
        assert (mine.cpu() - true).norm() <= room * true.norm()


def test_rows(place: Place) -> None:
    device, dtype = place
    q, k, _ = CASE.numbers(dtype, device, grad=True)
    rest = {**CASE.where(device), "sparse_config": SMALL}
    rows = torch.tensor([3, 20, 59, 64, -7, 10**6], dtype=torch.int32, device=device)
    some = infllm.selection_alignment_loss(q, k, **rest, rows=rows)
    whole = infllm.selection_alignment_loss(q, k, **rest)
    torch.testing.assert_close(some[:, :4], whole[:, rows[:4].long()], rtol=1e-5, atol=1e-6)
    assert not some[:, 4:].any()
    grad, = torch.autograd.grad(some.sum(), q)
    # Token 3, at position 243, has one block to choose from: nothing to learn.
    assert grad.abs().sum((1, 2)).nonzero().flatten().tolist() == [20, 59, 64]


def test_use_nope_teaches_what_scores() -> None:
    config = dataclasses.replace(SMALL, use_nope=True)
    q, k, _ = CASE.numbers(torch.float32, grad=True)
    q_score, k_score, _ = CASE.numbers(torch.float32, seed=1, grad=True)
    infllm.selection_alignment_loss(q, k, **CASE.where(), sparse_config=config, q_score=q_score,
                                    k_score=k_score).sum().backward()
    assert q.grad is None and k.grad is None
    assert q_score.grad.any() and k_score.grad.any()


def test_opcheck(place: Place) -> None:
    device, dtype = place
    q, k, _ = CASE.numbers(dtype, device, grad=True)
    plan = infllm.make_plan(**CASE.where(device), sparse_config=SMALL)
    rows = torch.arange(10, 65, 7, dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.infllm.align, (
        q, k, None, None, rows, *infllm.plan.batch_of(plan), 0.125, SMALL.numbers(), ""))


def test_opcheck_backward(device: str) -> None:
    q, k, _ = CASE.numbers(torch.bfloat16, device)
    plan = infllm.make_plan(**CASE.where(device), sparse_config=SMALL)
    inputs = (q, k, None, None, None, *infllm.plan.batch_of(plan), 0.125, SMALL.numbers(), "")
    loss, *kept = torch.ops.infllm.align(*inputs)
    torch.library.opcheck(torch.ops.infllm.align_backward, (torch.randn_like(loss), *kept, *inputs))


def test_compiles(place: Place) -> None:
    device, dtype = place
    where = CASE.where(device)

    def step(q: Tensor, k: Tensor) -> Tensor:
        return infllm.selection_alignment_loss(q, k, **where, sparse_config=SMALL).mean()

    q, k, _ = CASE.numbers(dtype, device, grad=True)
    expected = torch.autograd.grad(step(q, k), (q, k))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(q, k), (q, k)), expected, strict=True):
        assert torch.equal(a, b)


def test_no_second_derivative() -> None:
    q, k, _ = CASE.numbers(torch.float64, grad=True)
    loss = infllm.selection_alignment_loss(q, k, **CASE.where(), sparse_config=SMALL)
    grad, = torch.autograd.grad(loss.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        grad.sum().backward()


def test_rows_of_a_wrong_type() -> None:
    q, k, _ = CASE.numbers(torch.float32)
    with pytest.raises(ValueError, match=r"rows: torch.int64 \[2\] on cpu, expected int32"):
        infllm.selection_alignment_loss(q, k, starts((60, 5)), starts((300, 330)), 60, 330,
                                        sparse_config=SMALL, rows=torch.tensor([1, 2]))
