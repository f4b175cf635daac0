# SPDX-License-Identifier: Apache-2.0
"""The selection-alignment loss: teaches queries and keys to be found by mean-pooled keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infllm import _native
from infllm.attention import prepare, refuse_tangents, scale_of, scoring_plan_of
from infllm.call import Arrays, Pages, address, config_of, lse_type, run
from infllm.checks import (
    check_batch,
    check_config,
    check_given,
    check_qkv,
    check_scores,
    check_tensors,
)
from infllm.columns import Column, column_of
from infllm.config import SparseConfig
from infllm.ops import BATCH, OPTIONS, differentiate, implement, library, once
from infllm.plan import Plan, batch_of

_INPUTS = f"Tensor q, Tensor k, Tensor? q_score, Tensor? k_score, Tensor? rows, {BATCH}, {OPTIONS}"

library.define(f"align({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
library.define(f"align_backward(Tensor grad_loss, Tensor norms, Tensor grad_scores, "
               f"Tensor windows, {_INPUTS}) -> (Tensor, Tensor)")


def selection_alignment_loss(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    sparse_config: SparseConfig,
    rows: Tensor | None = None,
    softmax_scale: float | None = None,
    q_score: Tensor | None = None,
    k_score: Tensor | None = None,
    plan: Plan | None = None,
    backend: str | None = None,
) -> Tensor:
    """How far the scores that choose blocks are from where dense attention looks.

    The cross entropy, over the blocks that scores may choose, between dense attention's share of
    each block (a constant) and the soft-max of the scores (docs/algorithm.md). Add its mean, times
    a weight, to the training loss.

    Args:
        q: [T, Hq, D], k: [S, Hkv, D], packed as in ``attention``; so are the others.
        rows: int32 [R], the tokens (of T) to look at, ascending for speed: a few hundred are
            enough. None: all. Numbers outside [0, T) give a loss of 0.
        q_score, k_score: before RoPE, under use_nope; they get the gradients then.

    Returns:
        float32 [Hkv, R]; 0 for tokens without choosable blocks.
    """
    check_tensors(q=q, k=k)
    check_given(q_score=q_score, k_score=k_score, rows=rows)
    check_config(sparse_config, needed=True)
    refuse_tangents(q, k, q_score, k_score)
    plan = scoring_plan_of(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                           sparse_config, plan)
    scale = scale_of(q, softmax_scale)
    return _align_op(*prepare(q, k, q_score, k_score), rows, *batch_of(plan), scale,
                     sparse_config.numbers(), backend or "")[0]


def _shapes(q: Tensor, k: Tensor, q_score: Tensor | None, k_score: Tensor | None,
            rows: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_length: Tensor,
            page_table: Tensor, sparse: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
            scale: float, config: Sequence[int], backend: str) -> list[tuple[int, ...]]:
    """Of loss, norms, grad_scores and windows."""
    numbers, _ = config_of(tuple(config))
    check_qkv(q, k, k)
    check_scores(q_score, k_score, q, k, numbers)
    check_batch(q, cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse, max_seqlen_q,
                max_seqlen_k, numbers)
    if rows is not None and (rows.dtype != torch.int32 or rows.dim() != 1
                             or rows.device != q.device):
        raise ValueError(f"rows: {rows.dtype} {list(rows.shape)} on {rows.device}, expected int32 "
                         f"[R] on {q.device}")
    count = q.shape[0] if rows is None else rows.shape[0]
    table = (k.shape[1], count, numbers.blocks_in(max_seqlen_k))
    return [table[:2], (q.shape[1], count), table, table]


def _fake_align(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    types = (lse_type(q), lse_type(q), lse_type(q), torch.int32)
    return tuple(torch.empty(shape, dtype=dtype, device=q.device)
                 for shape, dtype in zip(_shapes(q, *rest), types, strict=True))


class _Work:
    """The arrays of one call and their native description; the keys are appended and pooled."""

    def __init__(self, column: Column, results: Sequence[Tensor], inputs: tuple[Any, ...]) -> None:
        (q, k, q_score, k_score, rows, *arrays, max_seqlen_q, max_seqlen_k, scale, config,
         _) = inputs
        _, native_config = config_of(tuple(config))
        self.arrays = Arrays(column, *arrays)
        self.tensors = [None if x is None else column.numbers(x)
                        for x in (q, k, q_score, k_score)]
        self.rows = None if rows is None else column.place(rows)
        self.pages = Pages(column, k, self.arrays.kv_length.shape[0], True, tuple(config))
        queries, keys, queries_score, keys_score = map(address, self.tensors)
        _native.append(column.native, column.stream(), self.pages.native,
                       self.arrays.keys(k.shape[0], max_seqlen_k), keys, keys, keys_score)
        self.native = _native.Align(
            self.pages.native, self.arrays.batch(q.shape[0], max_seqlen_q, max_seqlen_k),
            native_config, q.shape[1], scale, queries, queries_score, address(self.rows),
            results[0].shape[1], *map(address, results))


def _align(*inputs: Any) -> tuple[Tensor, ...]:
    q, backend = inputs[0], inputs[-1]
    column = column_of(q, backend)
    types = (column.accumulate, column.accumulate, column.accumulate, torch.int32)
    results = [column.empty(shape, dtype)
               for shape, dtype in zip(_shapes(*inputs), types, strict=True)]
    if results[0].numel() and results[2].numel():
        work = _Work(column, results, inputs)  # holds the arrays while the native side runs
        run(column, work.native)
    return *(x.to(q.device, lse_type(q)) for x in results[:3]), results[3].to(q.device)


implement("align", _align, _fake_align)


def _fake_backward(grad_loss: Tensor, norms: Tensor, grad_scores: Tensor, windows: Tensor,
                   q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return (torch.empty(q.shape, dtype=q.dtype, device=q.device),
            torch.empty(k.shape, dtype=k.dtype, device=k.device))


def _align_backward(grad_loss: Tensor, norms: Tensor, grad_scores: Tensor, windows: Tensor,
                    *inputs: Any) -> tuple[Tensor, Tensor]:
    q, k, backend = inputs[0], inputs[1], inputs[-1]
    column = column_of(q, backend)
    sums = [x.to(device=column.device, dtype=column.accumulate).contiguous()
            for x in (grad_loss, norms, grad_scores)]
    loss = torch.empty_like(sums[0])
    work = _Work(column, (loss, sums[1], sums[2], column.place(windows)), inputs)
    grad_rows = column.empty((loss.shape[1], *q.shape[1:]), column.activation)
    grad_k = column.empty(k.shape, column.activation)
    run(column, _native.AlignBackward(work.native, address(sums[0]), address(grad_rows),
                                      address(grad_k)))
    grad_q = grad_rows
    if work.rows is not None:
        tokens = q.shape[0]
        inside = (work.rows >= 0) & (work.rows < tokens)
        grad_q = grad_rows.new_zeros((tokens + 1, *q.shape[1:])).index_add_(
            0, torch.where(inside, work.rows, tokens).long(), grad_rows)[:tokens].contiguous()
    return grad_q.to(q.device, q.dtype), grad_k.to(k.device, k.dtype)


implement("align_backward", _align_backward, _fake_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, max_seqlen_q, max_seqlen_k, scale, config, backend = inputs
    _, norms, grad_scores, windows = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(norms, grad_scores, windows)
    ctx.save_for_backward(norms, grad_scores, windows, *tensors)
    ctx.options = (max_seqlen_q, max_seqlen_k, scale, config, backend)


def _gradients(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 15
    if grad_loss is not None:
        tensors = ctx.saved_tensors
        grad_q, grad_k = _backward_op(grad_loss, *tensors, *ctx.options)
        first = 0 if tensors[5] is None else 2  # under use_nope q_score and k_score learn
        grads[first], grads[first + 1] = grad_q, grad_k
    return tuple(grads)


_backward_op = once("align_backward")
_align_op = differentiate("align", _save, _gradients)
