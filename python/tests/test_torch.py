# SPDX-License-Identifier: Apache-2.0
"""What PyTorch asks of an operator: opcheck, torch.compile, autocast, checkpointing, threads."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from typing import Any

import pytest
import torch
from cases import SMALL, Case, starts
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import infllm

Place = tuple[str, torch.dtype]
OPS = torch.ops.infllm
CASES = [Case("ragged", (70, 3, 0, 130), (270, 64, 0, 300), heads_q=4, heads_kv=2),
         Case("dense", (70, 3), (70, 3), config=None)]


def planned(case: Case, device: str) -> tuple[Any, ...]:
    return infllm.plan.batch_of(infllm.make_plan(**case.where(device), sparse_config=case.config))


def options(case: Case) -> tuple[Any, ...]:
    return 0.125, [] if case.config is None else case.config.numbers(), ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opcheck_attention(case: Case, place: Place) -> None:
    device, dtype = place
    q, k, v = case.numbers(dtype, device, grad=True)
    torch.library.opcheck(OPS.attention, (q, k, v, None, None, None, *planned(case, device),
                                          *options(case)))


def test_opcheck_what_may_be_left_out(device: str) -> None:
    """A given selection; tensors from before RoPE."""
    case, dtype = CASES[0], torch.bfloat16
    q, k, v = case.numbers(dtype, device, grad=True)
    where = planned(case, device)
    chosen = OPS.attention(q, k, v, None, None, None, *where, *options(case))[2]
    torch.library.opcheck(OPS.attention, (q, k, v, None, None, chosen, *where, *options(case)))
    nope = dataclasses.replace(case, config=dataclasses.replace(SMALL, use_nope=True))
    scores = case.numbers(dtype, device, seed=1)[:2]
    for op, inputs in ((OPS.attention, (q, k, v, *scores, None)), (OPS.choose, (q, k, *scores))):
        torch.library.opcheck(op, (*inputs, *where, *options(nope)),
                              test_utils=("test_schema", "test_faketensor"))


def test_opcheck_attention_in_float64() -> None:
    case = Case("small", (30, 2), (270, 64), heads_q=2, heads_kv=1, head_dim=8)
    q, k, v = case.numbers(torch.float64, grad=True)
    torch.library.opcheck(OPS.attention, (q, k, v, None, None, None, *planned(case, "cpu"),
                                          *options(case)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opcheck_backward(case: Case, place: Place) -> None:
    device, dtype = place
    q, k, v = case.numbers(dtype, device)
    where = planned(case, device)
    out, lse, chosen = OPS.attention(q, k, v, None, None, None, *where, *options(case))
    torch.library.opcheck(OPS.attention_backward, (
        torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse,
        chosen if chosen.shape[2] else None, *where, *options(case)))


def test_opcheck_steps(place: Place) -> None:
    device, dtype = place
    case = CASES[0]
    q, k, _ = case.numbers(dtype, device)
    where = planned(case, device)
    cu_q, cu_k, kv_length, table, _, max_q, max_k = where
    scale, config, backend = options(case)
    every = torch.ones_like(kv_length, dtype=torch.bool)
    torch.library.opcheck(OPS.choose, (q, k, None, None, *where, scale, config, backend))
    torch.library.opcheck(OPS.compress, (k, cu_k, kv_length, table, max_k, config, backend))
    torch.library.opcheck(OPS.score, (q, k, cu_q, cu_k, kv_length, table, every, max_q, max_k,
                                      scale, config, backend))
    scores = OPS.score(q, k, cu_q, cu_k, kv_length, table, every, max_q, max_k, scale, config,
                       backend)
    torch.library.opcheck(OPS.select, (scores, cu_q, kv_length, every, max_q, max_k, config,
                                       backend))


def test_opcheck_cache(place: Place) -> None:
    device, dtype = place
    cache = infllm.KVCache(8, 2, 64, dtype=dtype, device=device, sparse_config=SMALL)
    k, v = (torch.randn(40, 2, 64).to(device, dtype) for _ in range(2))
    q = torch.randn(40, 4, 64).to(device, dtype)
    cu = starts((30, 10)).to(device)
    table = torch.arange(8, dtype=torch.int32, device=device).view(2, 4)
    where = (cu, cu.diff(), table, 30, 256)
    torch.library.opcheck(OPS.cache_append_, (cache.pages, k, v, None, *where, cache.numbers, ""))
    flags = torch.tensor([True, False], device=device)
    torch.library.opcheck(OPS.cache_attention, (q, None, cache.pages, flags, *where, 2, 0.125,
                                                cache.numbers, ""))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compile_fullgraph(case: Case, place: Place) -> None:
    """Forward and backward in one graph without a break, and the same numbers."""
    device, dtype = place
    where: dict[str, Any] = case.where(device)
    if case.config is not None:
        where = {"plan": infllm.make_plan(**where, sparse_config=case.config)}

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = infllm.attention(q * 2, k, v, **where, return_lse=True)
        return out.float().square().sum() + lse.exp().clamp(max=2).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=(
            "inductor" if device == "cuda" else "aot_eager"))):
        inputs = case.numbers(dtype, device, grad=True)
        loss = function(*inputs)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compile_with_many_lengths() -> None:
    """One program for the first length, one for the dense ones, one for the sparse ones."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return infllm.attention(q, k, v, sparse_config=SMALL)

    for tokens in (300, 301, 100, 200, 470, 255, 256):
        q, k, v = (torch.randn(tokens, 2, 16, requires_grad=True) for _ in range(3))
        out, expected = step(q, k, v), infllm.attention(q, k, v, sparse_config=SMALL)
        grads = (torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, expected))
        assert torch.equal(out, expected)
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
    assert counter.frame_count <= 3


def test_export_keeps_the_lengths_open() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return infllm.attention(q, k, k, sparse_config=SMALL)

    q, k = (torch.randn(2, 300, heads, 16) for heads in (4, 2))
    tokens = torch.export.Dim("tokens", min=SMALL.dense_len, max=2**20)
    program = torch.export.export(Model(), (q, k), dynamic_shapes=({1: tokens}, {1: tokens}))
    q, k = (torch.randn(2, 500, heads, 16) for heads in (4, 2))
    assert torch.equal(program.module()(q, k), Model()(q, k))


def test_autocast(device: str) -> None:
    q, k, v = (torch.randn(300, 2, 64, device=device, requires_grad=True) for _ in range(3))
    with torch.autocast(device, torch.bfloat16):
        out, lse = infllm.attention(q, k, v, sparse_config=SMALL, return_lse=True)
    assert out.dtype is torch.bfloat16 and lse.dtype is torch.float32
    expected = infllm.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), sparse_config=SMALL)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert q.grad.dtype is torch.float32 and k.grad.abs().sum() > 0


def test_checkpoint_repeats(place: Place) -> None:
    device, dtype = place

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return infllm.attention(q, k, v, sparse_config=SMALL)

    case = Case("one", (320,), (320,))
    inputs = case.numbers(dtype, device, grad=True)
    plain = torch.autograd.grad(block(*inputs).float().sum(), inputs)
    again = torch.autograd.grad(
        checkpoint(block, *inputs, use_reentrant=False).float().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_checkpoint_keeps_the_selection(place: Place) -> None:
    """What comes before attention changes from pass to pass; the blocks stay."""
    device, dtype = place
    case = Case("one", (320,), (320,))
    inputs = case.numbers(dtype, device, grad=True)
    seen = []

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = q * (1 if not seen else -1)
        chosen = infllm.choose(q, k, sparse_config=SMALL)
        seen.append(chosen)
        return infllm.attention(q, k, v, sparse_config=SMALL, selection=chosen)

    out = checkpoint(block, *inputs, use_reentrant=False, context_fn=infllm.save_selections)
    out.float().sum().backward()
    assert len(seen) == 2 and torch.equal(*seen)
    assert not torch.equal(seen[0], infllm.choose(-inputs[0], inputs[1], sparse_config=SMALL))


def test_no_second_derivative() -> None:
    q, k, v = (torch.randn(5, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    grad, = torch.autograd.grad(infllm.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func() -> None:
    """grad and vmap in either order are what autograd does for each of a batch."""
    q, k, v = (x[None] * torch.tensor([1.0, 2.0])[:, None, None, None]
               for x in Case("one", (320,), (320,)).numbers(torch.float32))

    def loss(*x: torch.Tensor) -> torch.Tensor:
        return infllm.attention(*x, sparse_config=SMALL).square().sum()

    expected = []
    for x in zip(q, k, v, strict=True):
        leaves = [y.clone().requires_grad_() for y in x]
        expected.append(torch.autograd.grad(loss(*leaves), leaves))
    every = (0, 1, 2)
    for found in (torch.func.vmap(torch.func.grad(loss, every))(q, k, v),
                  torch.func.grad(lambda *x: torch.func.vmap(loss)(*x).sum(), every)(q, k, v)):
        for mine, true in zip(found, zip(*expected, strict=True), strict=True):
            assert torch.equal(mine, torch.stack(true))
    with pytest.raises(RuntimeError, match="a second derivative was asked for"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, k[0], v[0]).sum())(q[0])


def test_deterministic_mode(place: Place) -> None:
    device, dtype = place
    q, k, v = Case("one", (320,), (320,)).numbers(dtype, device, grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        infllm.attention(q, k, v, sparse_config=SMALL).float().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert q.grad.isfinite().all()


def test_many_threads(device: str) -> None:
    dtype = torch.bfloat16
    q, k, v = Case("one", (320,), (320,)).numbers(dtype, device)
    expected = infllm.attention(q, k, v, sparse_config=SMALL)
    results = [None] * 8

    def work(i: int) -> None:
        for _ in range(5):
            results[i] = infllm.attention(q, k, v, sparse_config=SMALL)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if device == "cuda":
        torch.cuda.synchronize()
    assert all(torch.equal(expected, result) for result in results)


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_has_its_own_threads() -> None:
    """As a loader's workers. (PyTorch's own threads do not survive a fork: none of them here.)"""
    q, k, v = Case("one", (320,), (320,)).numbers(torch.float32)
    expected = infllm.attention(q, k, v, sparse_config=SMALL)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        same = infllm.attention(q, k, v, sparse_config=SMALL).numpy() == expected.numpy()
        os._exit(0 if same.all() else 1)
    assert os.waitpid(child, 0)[1] == 0
