# SPDX-License-Identifier: Apache-2.0
"""Attention without PyTorch's dispatcher, whose way through Python costs more than a short step.

Where something listens to the dispatcher (torch.compile, tracing, functorch, checkpoint policies, a
profiler, tensor subclasses) ``attention`` goes through ``torch.ops.infllm`` instead; both ways are
the same computation, ``infllm.call.Call``. What a plan's calls have in common is kept with the
plan.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from infllm.call import Call
from infllm.columns import stream_of
from infllm.config import SparseConfig
from infllm.plan import Plan, batch_of, uniform_plan

_PLAIN = (Tensor, torch.nn.Parameter)
# Not of PyTorch's public interface; where one is missing everything goes through the dispatcher.
_LISTENERS: list[Any] = [getattr(torch._C, name, None) for name in (
    "_len_torch_dispatch_stack", "_are_functorch_transforms_active", "_get_tracing_state")]
_LISTENERS.append(getattr(torch._C._autograd, "_profiler_enabled", None))
_KNOWN = all(_LISTENERS)


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether nobody but us has to see a call with these tensors."""
    if torch.compiler.is_compiling() or not _KNOWN:
        return False
    return (all(x is None or (type(x) in _PLAIN and not x.is_meta) for x in tensors)
            and not any(listens() for listens in _LISTENERS))


def _now(device: torch.device) -> tuple[Any, ...] | None:
    """What arrays that were made earlier have to share with a call to be of use to it: the stream
    that writes them, and whether autograd may keep them. None: there is no sharing, because a CUDA
    graph has to write its arrays itself, and reads them after we have let go of them."""
    inference = torch.is_inference_mode_enabled()
    if device.type != "cuda":
        return None, inference
    if torch.cuda.is_current_stream_capturing():
        return None
    return stream_of(device), inference


def uniform(batch: int, seqlen_q: int, seqlen_k: int, device: torch.device,
            config: SparseConfig | None, sparse: bool | Tensor | None) -> Plan:
    """``uniform_plan``, kept from call to call where it may be."""
    now = None if isinstance(sparse, Tensor) else _now(device)
    make = _uniform if now is not None else _uniform.__wrapped__
    return make(batch, seqlen_q, seqlen_k, device, config, sparse, now)


@functools.lru_cache(maxsize=64)
def _uniform(batch: int, seqlen_q: int, seqlen_k: int, device: torch.device,
             config: SparseConfig | None, sparse: bool | Tensor | None, _now: Any) -> Plan:
    return uniform_plan(batch, seqlen_q, seqlen_k, device, sparse_config=config, sparse=sparse)


def starts(batch: int, seqlen: int, device: torch.device) -> Tensor:
    """int32 [batch + 1], where each of ``batch`` sequences of one length begins; kept likewise."""
    now = _now(device)
    return (_starts if now is not None else _starts.__wrapped__)(batch, seqlen, device, now)


@functools.lru_cache(maxsize=64)
def _starts(batch: int, seqlen: int, device: torch.device, _now: Any) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen


def call_of(plan: Plan, q: Tensor, k: Tensor, v: Tensor, config: SparseConfig | None,
            backend: str, *, chooses: bool, dense: bool = False) -> Call:
    """The call for these tensors, kept with the plan. dense: whatever the plan says."""
    calls = plan.__dict__.setdefault("calls", {})
    # A forked process has none of its parent's threads, so its device is another one.
    key = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
           config, backend, chooses, dense, os.getpid(), torch.get_num_threads())
    call = calls.get(key)
    if call is None:
        batch = batch_of(plan)
        if dense:
            batch = (*batch[:4], None, *batch[5:])
        calls[key] = call = Call(q, k, v, batch, () if config is None else config.numbers(),
                                 backend, chooses=chooses)
    return call


def attend(inputs: tuple[Any, ...], plan: Plan, scale: float, config: SparseConfig | None,
           backend: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """``torch.ops.infllm.attention``, differentiable. inputs: its first six tensors."""
    q, k, v, q_score, k_score, selection = inputs
    call = call_of(plan, q, k, v, config, backend, chooses=selection is None)
    call.check(q, k, q_score, k_score, selection)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse, chosen = _Attention.apply(*inputs, call, scale, plan, config, backend)
        return out, lse, chosen
    return call.forward(q, k, v, q_score, k_score, selection, scale)


def choose(inputs: tuple[Any, ...], plan: Plan, scale: float, config: SparseConfig,
           backend: str) -> Tensor:
    """``torch.ops.infllm.choose``. inputs: its first four tensors."""
    q, k, q_score, k_score = inputs
    call = call_of(plan, q, k, k, config, backend, chooses=True)
    call.check(q, k, q_score, k_score, None)
    return call.choose(q, k, q_score, k_score, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, q_score: Tensor | None,
                k_score: Tensor | None, selection: Tensor | None, call: Call, scale: float,
                *where: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        out, lse, chosen = call.forward(q, k, v, q_score, k_score, selection, scale)
        ctx.set_materialize_grads(False)
        if chosen is not None:
            ctx.mark_non_differentiable(chosen)
        ctx.save_for_backward(q, k, v, out, lse, chosen if selection is None else selection)
        ctx.scale = scale
        ctx.where = where
        return out, lse, chosen

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> Any:
        none = [None] * 8
        if grad_out is None and grad_lse is None:
            return None, None, None, *none
        q, k, v, out, lse, selection = ctx.saved_tensors
        plan, config, backend = ctx.where
        if torch.is_grad_enabled() or not is_eager(grad_out, grad_lse, q, k, v):
            # create_graph: the operator is the one that says what it cannot do.
            return *torch.ops.infllm.attention_backward(
                grad_out, grad_lse, q, k, v, out, lse, selection, *batch_of(plan), ctx.scale,
                [] if config is None else config.numbers(), backend), *none
        call = call_of(plan, q, k, v, config, backend, chooses=False, dense=selection is None)
        return *call.backward(grad_out, grad_lse, q, k, v, out, lse, selection, ctx.scale), *none
