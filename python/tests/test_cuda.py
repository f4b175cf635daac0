# SPDX-License-Identifier: Apache-2.0
"""Streams, graphs, waiting and memory: what only a GPU has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import SMALL, Case

import infllm

pytestmark = pytest.mark.cuda
CASE = Case("one", (320,), (320,))
BF16 = torch.bfloat16


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the step, which has run once before, and what it will write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def test_nothing_waits(no_waiting: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    case = Case("ragged", (200, 0, 300), (300, 20, 300))
    q, k, v = case.numbers(BF16, "cuda", grad=True)
    where = case.where("cuda")
    grad = torch.randn_like(q)
    torch.cuda.set_sync_debug_mode("error")
    infllm.attention(q, k, v, **where, sparse_config=SMALL).backward(grad)
    infllm.choose(q, k, **where, sparse_config=SMALL)
    infllm.select(infllm.score(q, k, **where, sparse_config=SMALL), **where, sparse_config=SMALL)


def test_on_another_stream() -> None:
    """Work is in order on the caller's stream: inputs that are late there are waited for."""
    q, k, v = CASE.numbers(BF16, "cuda")
    expected = infllm.attention(q, k, v, sparse_config=SMALL)
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # half a second: others may use the device too
        late.copy_(q)
        out = infllm.attention(late, k, v, sparse_config=SMALL)
        done = not stream.query()
    stream.synchronize()
    assert done and torch.equal(out, expected)


def test_graph_capture_and_replay() -> None:
    """Forward and backward as one CUDA graph, replayed over new numbers."""
    q, k, v = CASE.numbers(BF16, "cuda", grad=True)
    grad = torch.randn_like(q)

    def step() -> tuple[torch.Tensor, ...]:
        out = infllm.attention(q, k, v, sparse_config=SMALL)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)

    graph, captured = capture(step)
    fresh = CASE.numbers(BF16, "cuda", seed=1)
    with torch.no_grad():
        for x, y in zip((q, k, v), fresh, strict=True):
            x.copy_(y)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_reduce_overhead() -> None:
    q, k, v = CASE.numbers(BF16, "cuda", grad=True)

    @torch.compile(fullgraph=True, mode="reduce-overhead")
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return infllm.attention(q * 1, k, v, sparse_config=SMALL)

    expected = infllm.attention(q, k, v, sparse_config=SMALL)
    true = torch.autograd.grad(expected.float().sum(), (q, k, v))
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        out = step(q, k, v)
        grads = torch.autograd.grad(out.float().sum(), (q, k, v))
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(grads, true, strict=True))


def test_decoding_in_a_graph_follows_the_lengths() -> None:
    steps, start = 6, 300
    q, k, v = (torch.randn(1, start + steps, heads, 64, device="cuda", dtype=BF16)
               for heads in (4, 2, 2))
    cache = infllm.KVCache(8, 2, 64, dtype=BF16, device="cuda", sparse_config=SMALL)
    table = torch.randperm(8, dtype=torch.int32, device="cuda")[None]
    length = torch.zeros(1, dtype=torch.int32, device="cuda")
    cache.append(k[:, :start], v[:, :start], length, table)
    length += start
    one = [x[:, start:start + 1].clone() for x in (q, k, v)]

    def step() -> torch.Tensor:
        return infllm.attend_with_kvcache(one[0], cache, one[1], one[2], cache_seqlens=length,
                                          page_table=table)

    graph, out = capture(step)
    whole = infllm.attention(q, k, v, sparse_config=SMALL)
    for i in range(steps):
        for x, y in zip(one, (q, k, v), strict=True):
            x.copy_(y[:, start + i:start + i + 1])
        graph.replay()
        true = whole[:, start + i:start + i + 1]
        assert (out - true).abs().max() <= 4 * torch.finfo(BF16).eps * true.abs().max()
        length += 1


def test_memory_is_pytorchs_and_is_given_back() -> None:
    q, k, v = CASE.numbers(BF16, "cuda", grad=True)

    def grown() -> int:
        """By how many bytes the device's free memory shrinks while we call."""
        free = torch.cuda.mem_get_info()[0]
        for _ in range(50):
            q.grad = k.grad = v.grad = None
            infllm.attention(q, k, v, sparse_config=SMALL).float().sum().backward()
        return free - torch.cuda.mem_get_info()[0]

    grown()
    held = torch.cuda.memory_allocated()
    # What leaks grows in every round; what other programs on the device take, not in every one.
    assert min(grown() for _ in range(5)) <= 0
    assert torch.cuda.memory_allocated() == held


def test_memory_nobody_wrote_does_not_matter() -> None:
    """The allocator hands out what others left: NaN here."""
    q, k, v = CASE.numbers(BF16, "cuda", grad=True)
    expected = infllm.attention(q, k, v, sparse_config=SMALL)
    for _ in range(3):
        trash = [torch.full((n,), -1, dtype=torch.uint8, device="cuda")
                 for n in (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)]
        del trash
        out = infllm.attention(q, k, v, sparse_config=SMALL)
        grads = torch.autograd.grad(out.float().sum(), (q, k, v))
        assert torch.equal(out, expected) and all(g.isfinite().all() for g in grads)


def test_blocks_out_of_range_are_not_followed() -> None:
    q, k, v = CASE.numbers(BF16, "cuda")
    wild = torch.randint(-2**31, 2**31 - 1, (2, 320, 4), dtype=torch.int32, device="cuda")
    infllm.attention(q, k, v, sparse_config=SMALL, selection=wild)
    torch.cuda.synchronize()


def test_the_reference_takes_device_tensors() -> None:
    q, k, v = CASE.numbers(torch.float32, "cuda", grad=True)
    out = infllm.attention(q, k, v, sparse_config=SMALL, backend="reference")
    assert out.is_cuda and out.dtype is torch.float32
    out.sum().backward()
    true = infllm.attention(*(x.detach().cpu() for x in (q, k, v)), sparse_config=SMALL,
                            backend="reference")
    assert torch.equal(out.cpu(), true) and q.grad.is_cuda


def test_the_current_device_stays() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    q, k, v = (x.to("cuda:1") for x in CASE.numbers(BF16))
    with torch.cuda.device(0):
        out = infllm.attention(q, k, v, sparse_config=SMALL)
        assert torch.cuda.current_device() == 0 and torch.empty(1, device="cuda").device.index == 0
    assert torch.equal(out.cpu(), infllm.attention(
        *(x.to("cuda:0") for x in (q, k, v)), sparse_config=SMALL).cpu())
