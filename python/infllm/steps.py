# SPDX-License-Identifier: Apache-2.0
"""The steps alone: compress, score, select; ``attend`` is attention over a given selection.

``infllm.attention`` runs them in one go and faster: a GPU then never writes the scores down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from infllm import _native
from infllm.attention import attention, prepare, scale_of, scoring_plan_of
from infllm.call import Arrays, Pages, address, columns_of, config_of, lse_type
from infllm.checks import check_batch, check_config, check_qkv, check_tensors
from infllm.columns import column_of
from infllm.config import SparseConfig
from infllm.ops import BATCH, OPTIONS, implement, library
from infllm.plan import Batch, Plan

library.define("compress(Tensor k, Tensor cu_seqlens_k, Tensor kv_length, Tensor page_table, "
               "SymInt max_seqlen_k, int[] config, str backend) -> (Tensor, Tensor)")
library.define(f"score(Tensor q, Tensor k, {BATCH}, {OPTIONS}) -> Tensor")
library.define("select(Tensor scores, Tensor cu_seqlens_q, Tensor kv_length, Tensor sparse, "
               "SymInt max_seqlen_q, SymInt max_seqlen_k, int[] config, str backend) -> Tensor")


def compress(k: Tensor, cu_seqlens_k: Tensor | None = None, max_seqlen_k: int | None = None, *,
             sparse_config: SparseConfig, backend: str | None = None,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean-pooled keys (paper, equation 3): what scores the blocks.

    Args:
        k: [S, Hkv, D] or [B, Sk, Hkv, D], keys as they score (before RoPE under use_nope).
        cu_seqlens_k, max_seqlen_k: as in ``attention``; None: one sequence.

    Returns:
        fine [S // kernel_stride, Hkv, D] and coarse [S // (4 kernel_stride), Hkv, D], packed like
        k with zeros behind the last sequence's, and int32 [B + 1] each, where a sequence begins in
        them. Only complete windows exist.
    """
    check_tensors(k=k)
    check_config(sparse_config, needed=True)
    if k.dim() not in (3, 4):
        raise ValueError(f"k: {list(k.shape)}, expected [S, Hkv, D] or [B, Sk, Hkv, D]")
    if cu_seqlens_k is None and max_seqlen_k is not None:
        raise ValueError("max_seqlen_k: given without cu_seqlens_k, expected both")
    plan = scoring_plan_of(k, k, cu_seqlens_k, None, max_seqlen_k, max_seqlen_k, sparse_config)
    config = sparse_config
    keys, = prepare(k.detach())
    fine, coarse = torch.ops.infllm.compress(keys, plan.cu_seqlens_k, plan.kv_length,
                                             plan.page_table, plan.max_seqlen_k, config.numbers(),
                                             backend or "")
    starts = [_window_starts(plan.kv_length, size, stride) for size, stride in
              ((config.kernel_size, config.kernel_stride),
               (4 * config.kernel_size, 4 * config.kernel_stride))]
    return fine, coarse, *starts


def score(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None = None,
          cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
          max_seqlen_k: int | None = None, *, sparse_config: SparseConfig,
          softmax_scale: float | None = None, plan: Plan | None = None,
          backend: str | None = None) -> Tensor:
    """One score per KV head, token and block (paper, equations 4 to 6); every sequence is scored.

    Args:
        q: [T, Hq, D] and k: [S, Hkv, D] as they score (before RoPE under use_nope).
        others: as in ``attention``.

    Returns:
        float32 [Hkv, T, N], N = ``sparse_config.blocks_in(max_seqlen_k)``: +inf for the sink and
        the local window, -inf for what lies ahead of the token. A token whose blocks all fit in
        the budget has +inf for all of them.
    """
    check_tensors(q=q, k=k)
    check_config(sparse_config, needed=True)
    plan = scoring_plan_of(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                           sparse_config, plan)
    scale = scale_of(q, softmax_scale)
    flags = torch.ones_like(plan.kv_length, dtype=torch.bool)
    return torch.ops.infllm.score(
        *prepare(q.detach(), k.detach()), plan.cu_seqlens_q, plan.cu_seqlens_k, plan.kv_length,
        plan.page_table, flags, plan.max_seqlen_q, plan.max_seqlen_k, scale,
        sparse_config.numbers(), backend or "")


def select(scores: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
           max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, *,
           sparse_config: SparseConfig, plan: Plan | None = None, backend: str | None = None,
           ) -> Tensor:
    """The best blocks of each KV head and token (paper, equation 7); ties go to the lower block.

    Args:
        scores: float32 [Hkv, T, N] from ``score`` of the same batch.
        others: as in ``attention``. Without cu_seqlens and plan: one sequence of T keys.

    Returns:
        int32 [Hkv, T, K], ascending, -1 behind the last; K = ``sparse_config.columns(...)``.
    """
    check_tensors(scores=scores)
    check_config(sparse_config, needed=True)
    if scores.dim() != 3 or scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores: {scores.dtype} {list(scores.shape)}, expected float32 "
                         "[Hkv, T, N]")
    tokens = scores.detach().transpose(0, 1)  # [T, Hkv, N], shaped as queries and keys are
    plan = scoring_plan_of(tokens, tokens, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                           sparse_config, plan)
    flags = torch.ones_like(plan.kv_length, dtype=torch.bool)
    return torch.ops.infllm.select(
        scores.detach(), plan.cu_seqlens_q, plan.kv_length, flags, plan.max_seqlen_q,
        plan.max_seqlen_k, sparse_config.numbers(), backend or "")


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: Tensor,
    cu_seqlens_q: Tensor | None = ..., cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., *,
    sparse_config: SparseConfig, softmax_scale: float | None = ...,
    return_lse: Literal[False] = ..., backend: str | None = ...,
) -> Tensor: ...


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, selection: Tensor,
    cu_seqlens_q: Tensor | None = ..., cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., *,
    sparse_config: SparseConfig, softmax_scale: float | None = ...,
    return_lse: bool = ..., backend: str | None = ...,
) -> tuple[Tensor, ...]: ...


def attend(q: Tensor, k: Tensor, v: Tensor, selection: Tensor, cu_seqlens_q: Tensor | None = None,
           cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
           max_seqlen_k: int | None = None, *, sparse_config: SparseConfig,
           softmax_scale: float | None = None, return_lse: bool = False,
           backend: str | None = None) -> Tensor | tuple[Tensor, ...]:
    """Attention over the selected blocks of every sequence (paper, equation 8), differentiable.

    The arguments are those of ``attention``; selection is int32 [Hkv, T, K].
    """
    check_tensors(selection=selection)
    return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                     sparse_config=sparse_config, softmax_scale=softmax_scale, sparse=True,
                     selection=selection, return_lse=return_lse, backend=backend)


def _window_starts(lengths: Tensor, size: int, stride: int) -> Tensor:
    counts = torch.where(lengths >= size, (lengths - size) // stride + 1, 0)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])


def _compress_shapes(k: Tensor, cu_seqlens_k: Tensor, kv_length: Tensor, page_table: Tensor,
                     max_seqlen_k: int, config: Sequence[int], backend: str,
                     ) -> tuple[Tensor, Tensor]:
    numbers, _ = config_of(tuple(config))
    check_qkv(k, k, k)
    check_batch(k, cu_seqlens_k, cu_seqlens_k, kv_length, page_table, None, max_seqlen_k,
                max_seqlen_k, numbers)
    stride = numbers.kernel_stride
    return (k.new_empty((k.shape[0] // stride, *k.shape[1:])),
            k.new_empty((k.shape[0] // (4 * stride), *k.shape[1:])))


def _compress(k: Tensor, cu_seqlens_k: Tensor, kv_length: Tensor, page_table: Tensor,
              max_seqlen_k: int, config: Sequence[int], backend: str) -> tuple[Tensor, Tensor]:
    results = _compress_shapes(k, cu_seqlens_k, kv_length, page_table, max_seqlen_k, config,
                               backend)
    column = column_of(k, backend, "k")
    arrays = Arrays(column, cu_seqlens_k, cu_seqlens_k, kv_length, page_table, None)
    pages = Pages(column, k, kv_length.shape[0], True, _pooled_as_given(config))
    keys = column.numbers(k)
    batch = arrays.keys(k.shape[0], max_seqlen_k)
    stream = column.stream()
    _native.append(column.native, stream, pages.native, batch, address(keys), address(keys), 0)
    fine, coarse = (torch.zeros(x.shape, dtype=column.activation, device=column.device)
                    for x in results)
    _native.read_pooled(column.native, stream, pages.native, batch, address(fine), address(coarse))
    return fine.to(k.device, k.dtype), coarse.to(k.device, k.dtype)


implement("compress", _compress, _compress_shapes)


def _pooled_as_given(config: Sequence[int]) -> tuple[int, ...]:
    """The config without use_nope: the caller passes what scores, there is no second plane."""
    return (*config[:7], 0, *config[8:])


def _score_shape(q: Tensor, k: Tensor, batch: Batch, config: Sequence[int],
                 ) -> tuple[int, int, int]:
    numbers, _ = config_of(tuple(config))
    check_qkv(q, k, k)
    check_batch(q, *batch, numbers)
    return k.shape[1], q.shape[0], numbers.blocks_in(batch[-1])


def _fake_score(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    return torch.empty(_score_shape(q, k, rest[:7], rest[8]), dtype=lse_type(q), device=q.device)


def _score(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_length: Tensor,
           page_table: Tensor, sparse: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
           scale: float, config: Sequence[int], backend: str) -> Tensor:
    shape = _score_shape(q, k, (cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse,
                                max_seqlen_q, max_seqlen_k), config)
    column = column_of(q, backend)
    given = _pooled_as_given(config)
    _, native_config = config_of(given)
    arrays = Arrays(column, cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse)
    pages = Pages(column, k, kv_length.shape[0], True, given)
    queries, keys = column.numbers(q), column.numbers(k)
    stream = column.stream()
    _native.append(column.native, stream, pages.native, arrays.keys(k.shape[0], max_seqlen_k),
                   address(keys), address(keys), 0)
    batch = arrays.batch(q.shape[0], max_seqlen_q, max_seqlen_k)
    scores = column.empty(shape, column.accumulate)
    described = (pages.native, batch, native_config, q.shape[1], scale)
    needed = _native.score_workspace_bytes(column.native, *described)
    workspace = column.bytes(needed)
    _native.score(column.native, stream, *described, address(queries), address(scores),
                  address(workspace), needed)
    return scores.to(q.device, lse_type(q))


implement("score", _score, _fake_score)


def _select_shapes(scores: Tensor, cu_seqlens_q: Tensor, kv_length: Tensor, sparse: Tensor,
                   max_seqlen_q: int, max_seqlen_k: int, config: Sequence[int], backend: str,
                   ) -> Tensor:
    numbers, _ = config_of(tuple(config))
    blocks = numbers.blocks_in(max_seqlen_k)
    if scores.dim() != 3 or scores.shape[2] != blocks:
        raise ValueError(f"scores: {list(scores.shape)}, expected [Hkv, T, {blocks}] for "
                         f"max_seqlen_k = {max_seqlen_k}")
    return torch.empty((*scores.shape[:2], columns_of(numbers, sparse, max_seqlen_k)),
                       dtype=torch.int32, device=scores.device)


def _select(scores: Tensor, cu_seqlens_q: Tensor, kv_length: Tensor, sparse: Tensor,
            max_seqlen_q: int, max_seqlen_k: int, config: Sequence[int], backend: str) -> Tensor:
    shape = _select_shapes(scores, cu_seqlens_q, kv_length, sparse, max_seqlen_q, max_seqlen_k,
                           config, backend).shape
    # Scores are float32 on every device; the column is chosen by place alone.
    kind = torch.bfloat16 if scores.is_cuda else scores.dtype
    column = column_of(scores.new_empty(0, dtype=kind), backend)
    numbers, native_config = config_of(tuple(config))
    table = torch.zeros((kv_length.shape[0], shape[2] and numbers.blocks_in(max_seqlen_k)),
                        dtype=torch.int32, device=column.device)
    check_batch(scores, cu_seqlens_q, cu_seqlens_q, kv_length, table.to(scores.device), sparse,
                max_seqlen_q, max_seqlen_k, numbers)
    arrays = Arrays(column, cu_seqlens_q, cu_seqlens_q, kv_length, table, sparse)
    batch = arrays.batch(scores.shape[1], max_seqlen_q, max_seqlen_k)
    values = scores.to(column.device, column.accumulate).contiguous()
    selection = torch.full(shape, -1, dtype=torch.int32, device=column.device)
    _native.select(column.native, column.stream(), batch, native_config, scores.shape[0],
                   address(values), address(selection))
    return selection.to(scores.device)


implement("select", _select, _select_shapes)
