# SPDX-License-Identifier: Apache-2.0
"""The switchable attention: dense on short inputs, sparse on long ones, same weights."""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from infllm import eager, ops
from infllm.checks import check_config, check_given, check_ints, check_tensors
from infllm.config import SparseConfig
from infllm.plan import Plan, batch_of, check_plan, make_plan, uniform_plan


class Options(TypedDict, total=False):
    """Arguments of ``attention`` that may be passed on by name."""

    sparse_config: SparseConfig | None
    softmax_scale: float | None
    sparse: bool | Tensor | None
    selection: Tensor | None
    q_score: Tensor | None
    k_score: Tensor | None
    plan: Plan | None
    backend: str | None


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor,
    cu_seqlens_q: Tensor | None = ..., cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., *,
    return_lse: Literal[False] = ..., return_selection: Literal[False] = ...,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor,
    cu_seqlens_q: Tensor | None = ..., cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., *,
    return_lse: bool = ..., return_selection: bool = ..., **options: Unpack[Options],
) -> tuple[Tensor, ...]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    sparse_config: SparseConfig | None = None,
    softmax_scale: float | None = None,
    sparse: bool | Tensor | None = None,
    selection: Tensor | None = None,
    q_score: Tensor | None = None,
    k_score: Tensor | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    return_selection: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Causal attention over packed sequences, dense or over the blocks that matter.

    Shapes: T query tokens and S key tokens, packed; Hq query heads in groups over Hkv KV heads; B
    sequences. The queries of a sequence are its last tokens (bottom-right causal), so
    ``len_q <= len_k`` and a shard of the queries may be given with all keys up to its end.

    Args:
        q: [T, Hq, D] after RoPE; or [B, Sq, Hq, D] for sequences of one length, without cu_seqlens.
        k, v: [S, Hkv, D]; or [B, Sk, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each sequence begins. None: one sequence.
            cu_seqlens_k None: the same as cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: the longest sequence, or a bound on it. Needed with cu_seqlens
            on CUDA, where looking would wait for the device.
        sparse_config: None is the plan's; without a plan, attends densely to everything.
        softmax_scale: None is D ** -0.5.
        sparse: None switches each sequence by ``sparse_config.dense_len`` on its number of keys. A
            bool, or a bool tensor [B], decides instead (a shard of a sequence takes the whole
            sequence's answer).
        selection: int32 [Hkv, T, K], ascending block indices with -1 behind them, to attend to
            these blocks; none are chosen then. Used for the sequences that are sparse.
        q_score, k_score: like q and k, before RoPE, when ``sparse_config.use_nope``.
        plan: from ``make_plan``, in place of cu_seqlens, max_seqlen and sparse: made once for all
            layers of a step.
        return_lse: also the log-sum-exp, float32 [Hq, T], differentiable.
        return_selection: also the selection, int32 [Hkv, T, K], K = ``sparse_config.columns(
            max_seqlen_k)``; K = 0 where no sequence can be sparse. Rows of dense sequences are -1.
        backend: None chooses by device and dtype; "reference" computes in float64 on the CPU.

    Returns:
        out like q, or a tuple (out, lse, selection) of what was asked for. Gradients reach q, k and
        v through out and lse; the selection is held constant.
    """
    check_tensors(q=q, k=k, v=v)
    check_given(selection=selection, q_score=q_score, k_score=k_score)
    check_config(sparse_config)
    if sparse_config is None and isinstance(plan, Plan):
        sparse_config = plan.sparse_config
    if selection is not None and sparse_config is None:
        raise ValueError("selection: given without sparse_config; pass the config too")
    refuse_tangents(q, k, v)
    shape = q.shape
    plan = plan_of(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sparse_config,
                   sparse, plan)
    scale = scale_of(q, softmax_scale)
    inputs = (*prepare(q, k, v, q_score, k_score), selection)
    if eager.is_eager(*inputs):
        out, lse, chosen = eager.attend(inputs, plan, scale, sparse_config, backend or "")
    else:
        out, lse, chosen = ops.attention(
            *inputs, *batch_of(plan), scale,
            sparse_config.numbers() if sparse_config is not None else [], backend or "")
    results = [out if len(shape) == 3 else out.view(shape)]
    if return_lse:
        results.append(lse)
    if return_selection:
        given = chosen if selection is None else selection
        results.append(inputs[0].new_empty((inputs[1].shape[1], inputs[0].shape[0], 0),
                                           dtype=torch.int32) if given is None else given)
    return results[0] if len(results) == 1 else tuple(results)


def choose(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    sparse_config: SparseConfig,
    softmax_scale: float | None = None,
    sparse: bool | Tensor | None = None,
    q_score: Tensor | None = None,
    k_score: Tensor | None = None,
    plan: Plan | None = None,
    backend: str | None = None,
) -> Tensor:
    """The blocks that ``attention`` would attend to, for its argument ``selection``.

    Chosen apart, they can be kept: under activation checkpointing (``infllm.save_selections``) the
    second forward pass then attends to the very same blocks.

    Args: those of ``attention``.

    Returns:
        int32 [Hkv, T, K], ascending in each row, -1 behind the last; rows of dense sequences -1.
        K = ``sparse_config.columns(max_seqlen_k)``, or 0 where no sequence can be sparse.
    """
    check_tensors(q=q, k=k)
    check_given(q_score=q_score, k_score=k_score)
    check_config(sparse_config, needed=True)
    plan = plan_of(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sparse_config,
                   sparse, plan)
    scale = scale_of(q, softmax_scale)
    inputs = prepare(q, k, q_score, k_score)
    with torch.no_grad():
        if eager.is_eager(*inputs):
            return eager.choose(inputs, plan, scale, sparse_config, backend or "")
        return torch.ops.infllm.choose(*inputs, *batch_of(plan), scale, sparse_config.numbers(),
                                       backend or "")


def refuse_tangents(*tensors: Tensor | None) -> None:
    """PyTorch takes an operator without a forward-mode derivative for a constant."""
    if forward_ad._current_level >= 0 and any(
            x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("infllm: a forward-mode derivative (jvp) was asked for, but "
                                  "there is only backward")


def scale_of(q: Tensor, softmax_scale: float | None) -> float:
    if softmax_scale is None:
        return max(q.shape[-1], 1) ** -0.5
    try:
        scale = float(softmax_scale)
    except (TypeError, ValueError):
        raise TypeError(f"softmax_scale: {softmax_scale!r}, expected a number") from None
    if not 0.0 < scale < math.inf:
        raise ValueError(f"softmax_scale: {scale}, expected a positive number; None is "
                         "head_dim ** -0.5")
    return scale


def prepare(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors packed, [B, S, H, D] as [B S, H, D], and under autocast in its type, as torch's
    own attention does."""
    tensors = (first, *others)
    device = first.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(x if x is None or x.dtype is torch.float64 else x.to(dtype)
                        for x in tensors)
    return tuple(x.flatten(0, 1) if x is not None and x.dim() == 4 else x for x in tensors)


def plan_of(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
            max_seqlen_q: int | None, max_seqlen_k: int | None, config: SparseConfig | None,
            sparse: bool | Tensor | None, plan: Plan | None = None) -> Plan:
    """The plan that was given, or that of the other arguments."""
    if plan is not None:
        if (cu_seqlens_q is not None or cu_seqlens_k is not None or max_seqlen_q is not None
                or max_seqlen_k is not None or sparse is not None):
            raise ValueError("plan: given with cu_seqlens, max_seqlen or sparse, expected it alone")
        check_plan(plan, config)
        return plan
    if q.dim() not in (3, 4) or k.dim() != q.dim():
        raise ValueError(f"q and k: {list(q.shape)} and {list(k.shape)}, expected [T, Hq, D] and "
                         "[S, Hkv, D], or both with a leading B")
    if cu_seqlens_q is None:
        for name, x in (("cu_seqlens_k", cu_seqlens_k), ("max_seqlen_q", max_seqlen_q),
                        ("max_seqlen_k", max_seqlen_k)):
            if x is not None:
                raise ValueError(f"{name}: given without cu_seqlens_q, expected both")
        if q.dim() == 4 and q.shape[0] != k.shape[0]:
            raise ValueError(f"k: {k.shape[0]} sequences, expected {q.shape[0]} as q")
        lengths = ((1, q.shape[0], k.shape[0]) if q.dim() == 3
                   else (q.shape[0], q.shape[1], k.shape[1]))
        if eager.is_eager(q, k):
            return eager.uniform(*lengths, q.device, config, sparse)
        return uniform_plan(*lengths, q.device, sparse_config=config, sparse=sparse)
    if q.dim() == 4:
        raise ValueError(f"q: {list(q.shape)} with cu_seqlens_q, expected packed [T, Hq, D]")
    max_seqlen_q = longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    if cu_seqlens_k is None:
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    else:
        max_seqlen_k = longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    return make_plan(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sparse_config=config,
                     sparse=sparse)


def scoring_plan_of(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None,
                    cu_seqlens_k: Tensor | None, max_seqlen_q: int | None,
                    max_seqlen_k: int | None, config: SparseConfig, plan: Plan | None = None,
                    ) -> Plan:
    """``plan_of`` for what scores every sequence, whatever its length."""
    if plan is None:
        return plan_of(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, config, True)
    check_plan(plan, config, switches=False)
    return plan_of(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, plan)


def longest(name: str, bound: int | None, cu_seqlens: Tensor) -> int:
    """The bound on the lengths of packed sequences, or on a host their longest."""
    if bound is not None:
        return bound
    check_ints(f"cu_seqlens_{name[-1]}", cu_seqlens, "[B + 1]")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        raise ValueError(f"{name}: missing, expected the longest sequence, or a bound on it; "
                         "looking for it would wait for the device, or break a compiled graph")
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
