# SPDX-License-Identifier: Apache-2.0
"""The short way around PyTorch's dispatcher: the same results, and out of the way of listeners."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from cases import SMALL, Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import infllm
from infllm import eager

Place = tuple[str, torch.dtype]
CASES = [Case("sparse", (320,), (320,)), Case("dense", (70,), (90,), config=None)]


class Listener(TorchDispatchMode):
    """Writes down which of our operators pass."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "infllm":
            self.heard.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def results(case: Case, place: Place, **rest: Any) -> list[Tensor]:
    device, dtype = place
    q, k, v = case.numbers(dtype, device, grad=True)
    out, lse, chosen = infllm.attention(q, k, v, **rest, sparse_config=case.config,
                                        return_lse=True, return_selection=True)
    torch.manual_seed(1)
    grads = torch.autograd.grad((out, lse), (q, k, v),
                                (torch.randn_like(out), torch.randn_like(lse)))
    return [out.detach(), lse.detach(), chosen, *grads]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_ways_are_one(case: Case, place: Place) -> None:
    plan = infllm.make_plan(**case.where(place[0]), sparse_config=case.config)
    short = results(case, place, plan=plan)
    with Listener() as listener:
        long = results(case, place, plan=plan)
    assert listener.heard == ["infllm::attention", "infllm::attention_backward"]
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
    again = results(case, place, plan=plan)  # by what the plan keeps
    assert all(torch.equal(a, b) for a, b in zip(short, again, strict=True))
    unplanned = results(case, place)
    assert all(torch.equal(a, b) for a, b in zip(short, unplanned, strict=True))


def test_choosing_and_decoding(place: Place) -> None:
    device, dtype = place
    q, k, v = (torch.randn(1, 300, heads, 64).to(device, dtype) for heads in (4, 2, 2))
    length = torch.tensor([299], dtype=torch.int32, device=device)
    table = torch.arange(5, dtype=torch.int32, device=device)[None]

    def step() -> list[Tensor]:
        cache = infllm.KVCache(5, 2, 64, dtype=dtype, device=device, sparse_config=SMALL)
        cache.append(k[:, :299], v[:, :299], length - 299, table)
        places = {"cache_seqlens": length, "page_table": table}
        first = infllm.attend_with_kvcache(q[:, 299:], cache, k[:, 299:], v[:, 299:],
                                           return_softmax_lse=True, **places)
        places["cache_seqlens"] = length + 1  # nothing new: all keys are there
        second = infllm.attend_with_kvcache(q[:, 299:], cache, return_selection=True, **places)
        return [*first, *second, infllm.choose(q, k, sparse_config=SMALL)]

    short = step()
    with Listener() as listener:
        long = step()
    assert listener.heard == ["infllm::cache_append_"] * 2 + [
        "infllm::cache_attention"] * 2 + ["infllm::choose"]
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
    assert torch.equal(short[0], short[2])


def test_a_profiler_sees_the_operators() -> None:
    q, k, v = CASES[0].numbers(torch.float32)
    with torch.profiler.profile() as profile:
        infllm.attention(q, k, v, sparse_config=SMALL)
    assert "infllm::attention" in {event.name for event in profile.events()}


def test_subclasses_are_dispatched() -> None:
    class Other(Tensor):
        pass

    q, k, v = CASES[0].numbers(torch.float32)
    assert eager.is_eager(q, k, None) and eager.is_eager(torch.nn.Parameter(q))
    assert not eager.is_eager(q, k.as_subclass(Other))
    with torch._subclasses.FakeTensorMode():
        assert not eager.is_eager(q)


def test_a_plan_is_checked_for_every_shape_and_type() -> None:
    q, k, v = (torch.randn(300, 2, 16) for _ in range(3))
    plan = infllm.make_plan(torch.tensor([0, 300], dtype=torch.int32), None, 300, 300)
    for _ in range(2):
        infllm.attention(q, k, v, plan=plan)
        with pytest.raises(ValueError, match=r"v: torch.float32 \[299, 2, 16\]"):
            infllm.attention(q, k, v[1:], plan=plan)
        with pytest.raises(ValueError, match="cu_seqlens_q: ends at 300, expected 299"):
            infllm.attention(q[1:], k, v, plan=plan)
    assert infllm.attention(*(x.double() for x in (q, k, v)), plan=plan).dtype is torch.float64
    # A host looks into the plan's arrays each time.
    plan.cu_seqlens_q[1] = 299
    with pytest.raises(ValueError, match="cu_seqlens_q: ends at 299, expected 300"):
        infllm.attention(q, k, v, plan=plan)


def test_a_plan_knows_its_config(place: Place) -> None:
    device, dtype = place
    q, k, v = CASES[0].numbers(dtype, device)
    where = CASES[0].where(device)
    sparse = infllm.attention(q, k, v, plan=infllm.make_plan(**where, sparse_config=SMALL))
    assert torch.equal(sparse, infllm.attention(q, k, v, sparse_config=SMALL))
    dense = infllm.attention(q, k, v, plan=infllm.make_plan(**where))
    assert torch.equal(dense, infllm.attention(q, k, v)) and not torch.equal(dense, sparse)


def test_equal_calls_keep_one_thing() -> None:
    q, k, v = CASES[0].numbers(torch.float32)
    plan = infllm.make_plan(**CASES[0].where(), sparse_config=SMALL)
    for _ in range(3):
        infllm.attention(q, k, v, plan=plan, sparse_config=dataclasses.replace(SMALL))
    assert len(plan.__dict__["calls"]) == 1


def test_a_used_plan_can_be_copied() -> None:
    q, k, v = CASES[0].numbers(torch.float32)
    plan = infllm.make_plan(**CASES[0].where(), sparse_config=SMALL)
    out = infllm.attention(q, k, v, plan=plan, sparse_config=SMALL)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert other != plan and plan in [other, plan]  # comparing asks no tensor
        assert torch.equal(infllm.attention(q, k, v, plan=other, sparse_config=SMALL), out)


def test_inference_mode_leaves_nothing_behind() -> None:
    eager._uniform.cache_clear()
    q, k, v = CASES[0].numbers(torch.float32, grad=True)
    with torch.inference_mode():
        infllm.attention(q, k, v, sparse_config=SMALL)
    with Listener():  # the operator keeps the plan's arrays for its gradient
        infllm.attention(q, k, v, sparse_config=SMALL).sum().backward()


@pytest.mark.cuda
def test_a_graph_keeps_its_own_plan() -> None:
    """What is kept from call to call may be dropped while a graph still reads its own."""
    q, k, v = CASES[0].numbers(torch.bfloat16, "cuda")
    expected = infllm.attention(q, k, v, sparse_config=SMALL)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = infllm.attention(q, k, v, sparse_config=SMALL)
    eager._uniform.cache_clear()
    trash = [torch.full((1 << n,), -1, dtype=torch.uint8, device="cuda") for n in range(9, 25)]
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected) and len(trash) == 16


@pytest.mark.cuda
def test_another_stream_has_its_own_plan() -> None:
    q, k, v = CASES[0].numbers(torch.bfloat16, "cuda")
    expected = infllm.attention(q, k, v, sparse_config=SMALL)
    torch.cuda.synchronize()
    eager._uniform.cache_clear()
    late, soon = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(late):
        torch.cuda._sleep(1_000_000_000)  # half a second: others may use the device too
        infllm.attention(q, k, v, sparse_config=SMALL)
    with torch.cuda.stream(soon):
        out = infllm.attention(q, k, v, sparse_config=SMALL)
    soon.synchronize()
    waiting = not late.query()
    assert torch.equal(out, expected) and waiting
    late.synchronize()
