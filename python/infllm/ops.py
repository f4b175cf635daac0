# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.infllm.*``: schemas, kernels, fake kernels, gradients.

They are what torch.compile and CUDA graphs see. Every shape follows from shapes and ints, no kernel
waits for the device, and all memory is PyTorch's. ``config`` is ``SparseConfig.numbers()``, empty
for attention that is always dense; the other arguments are those of ``infllm.attention`` and the
fields of ``infllm.Plan``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infllm import _native
from infllm.checks import (
    check_batch,
    check_like,
    check_qkv,
    check_scores,
    check_selected_blocks,
    check_selection,
)
from infllm.columns import Column, column_of
from infllm.config import SparseConfig
from infllm.plan import page_count

BATCH = ("Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor kv_length, Tensor page_table, "
          "Tensor? sparse, int max_seqlen_q, int max_seqlen_k")
OPTIONS = "float scale, int[] config, str backend"

library = torch.library.Library("infllm", "DEF")
library.define(f"attention(Tensor q, Tensor k, Tensor v, Tensor? q_score, Tensor? k_score, "
                f"Tensor? selection, {BATCH}, {OPTIONS}) -> (Tensor, Tensor, Tensor)")
library.define(f"attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, "
                f"Tensor v, Tensor out, Tensor lse, Tensor? selection, {BATCH}, {OPTIONS}) "
                "-> (Tensor, Tensor, Tensor)")
library.define(f"choose(Tensor q, Tensor k, Tensor? q_score, Tensor? k_score, {BATCH}, "
                f"{OPTIONS}) -> Tensor")


def implement(name: str, kernel: Any, fake: Any) -> None:
    for device in ("CPU", "CUDA"):
        library.impl(name, kernel, device)
    torch.library.register_fake(f"infllm::{name}", fake, lib=library)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@functools.cache
def config_of(numbers: tuple[int, ...]) -> tuple[SparseConfig, Any]:
    """The config in Python and for the native side, which refuses numbers that do not fit."""
    config = SparseConfig.from_numbers(numbers) if numbers else SparseConfig()
    return config, _native.SparseConfig(config.numbers())


@functools.cache
def layout_of(column: Column, heads_kv: int, head_dim: int, pooled: bool,
              numbers: tuple[int, ...]) -> tuple[Any, int]:
    """A cache layout and the bytes of its pages."""
    layout = _native.KvLayout(column.cache, heads_kv, head_dim, pooled, config_of(numbers)[1])
    return layout, layout.page_bytes(column.native)


def lse_type(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


class Arrays:
    """A batch's arrays on its column. Keeps them alive while the native side holds addresses."""

    def __init__(self, column: Column, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                 kv_length: Tensor, page_table: Tensor, sparse: Tensor | None) -> None:
        self.cu_seqlens_q = column.place(cu_seqlens_q)
        self.cu_seqlens_k = column.place(cu_seqlens_k)
        self.kv_length = column.place(kv_length)
        self.page_table = column.place(page_table)
        self.sparse = None if sparse is None else column.place(sparse)

    def batch(self, tokens: int, max_seqlen_q: int, max_seqlen_k: int) -> Any:
        """The plan of a step over q."""
        return _native.Batch(self.kv_length.shape[0], tokens, self.cu_seqlens_q.data_ptr(),
                             self.kv_length.data_ptr(), self.page_table.data_ptr(),
                             self.page_table.shape[1], address(self.sparse),
                             min(max_seqlen_q, tokens), max_seqlen_k)

    def keys(self, tokens: int, max_seqlen_k: int) -> Any:
        """The plan of a step that appends all of k and v."""
        return _native.Batch(self.kv_length.shape[0], tokens, self.cu_seqlens_k.data_ptr(),
                             self.kv_length.data_ptr(), self.page_table.data_ptr(),
                             self.page_table.shape[1], 0, min(max_seqlen_k, tokens), max_seqlen_k)


class Pages:
    """Memory for the pages of packed keys."""

    def __init__(self, column: Column, k: Tensor, sequences: int, pooled: bool,
                 numbers: tuple[int, ...]) -> None:
        layout, page_bytes = layout_of(column, k.shape[1], k.shape[2], pooled, numbers)
        count = page_count(k.shape[0], sequences, config_of(numbers)[0])
        self.memory = column.bytes(count * page_bytes)
        self.native = _native.KvPages(self.memory.data_ptr(), layout, page_bytes, count)


def run(column: Column, work: Any) -> None:
    """Starts a Forward or Backward on the caller's stream, with a workspace of PyTorch's."""
    needed = work.workspace_bytes(column.native)
    workspace = column.bytes(needed)
    work.run(column.native, column.stream(), workspace.data_ptr(), needed)


def columns_of(config: SparseConfig, sparse: Tensor | None, max_seqlen_k: int) -> int:
    return 0 if sparse is None else config.columns(max_seqlen_k)


def _check(q: Tensor, k: Tensor, v: Tensor, batch: Sequence[Any],
           config: Sequence[int]) -> SparseConfig:
    check_qkv(q, k, v)
    numbers, _ = config_of(tuple(config))
    check_batch(q, *batch, numbers)
    return numbers


# ---- attention ----------------------------------------------------------------------------------


def _attention_shapes(
    q: Tensor, k: Tensor, v: Tensor, q_score: Tensor | None, k_score: Tensor | None,
    selection: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_length: Tensor,
    page_table: Tensor, sparse: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, scale: float,
    config: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = _check(q, k, v, (cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse,
                               max_seqlen_q, max_seqlen_k), config)
    columns = 0
    if selection is not None:
        check_selection(selection, q, k.shape[1])
    else:
        check_scores(q_score, k_score, q, k, numbers if config else None)
        columns = columns_of(numbers, sparse, max_seqlen_k)
    return (torch.empty(q.shape, dtype=q.dtype, device=q.device),
            torch.empty((q.shape[1], q.shape[0]), dtype=lse_type(q), device=q.device),
            torch.empty((k.shape[1], q.shape[0], columns), dtype=torch.int32, device=q.device))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, q_score: Tensor | None, k_score: Tensor | None,
    selection: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_length: Tensor,
    page_table: Tensor, sparse: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, scale: float,
    config: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = (cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse, max_seqlen_q, max_seqlen_k)
    numbers = _check(q, k, v, batch, config)
    if selection is None:
        check_scores(q_score, k_score, q, k, numbers if config else None)
    else:
        check_selection(selection, q, k.shape[1])
    work = _Forward(q, k, v, q_score, k_score, selection, batch, scale, tuple(config), backend,
                    attends=True)
    run(work.column, work.native)
    chosen = work.selection if selection is None else work.selection.new_empty(
        (k.shape[1], q.shape[0], 0))
    return (work.out.to(q.device, q.dtype), work.lse.to(q.device, lse_type(q)),
            chosen.to(q.device))


class _Forward:
    """The arrays and the native description of one forward pass, or of its choice alone."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, q_score: Tensor | None,
                 k_score: Tensor | None, selection: Tensor | None, batch: tuple[Any, ...],
                 scale: float, config: tuple[int, ...], backend: str, attends: bool,
                 out: Tensor | None = None, lse: Tensor | None = None) -> None:
        *arrays, max_seqlen_q, max_seqlen_k = batch
        tokens, heads_q, _ = q.shape
        numbers, native_config = config_of(config)
        column = self.column = column_of(q, backend)
        self.arrays = Arrays(column, *arrays)
        chooses = selection is None and self.arrays.sparse is not None
        nope = chooses and numbers.use_nope
        self.inputs = [column.numbers(x) if x is not None else None
                       for x in (q, k, v, q_score if nope else None, k_score if nope else None)]
        if selection is not None:
            self.selection = column.place(selection)
            if not column.is_cuda:
                check_selected_blocks(self.selection, numbers.blocks_in(max_seqlen_k))
        else:
            columns = columns_of(numbers, self.arrays.sparse, max_seqlen_k)
            self.selection = torch.full((k.shape[1], tokens, columns), -1, dtype=torch.int32,
                                        device=column.device)
        self.out = out
        self.lse = lse
        if attends and out is None:
            self.out = column.empty(q.shape, column.activation)
            self.lse = column.empty((heads_q, tokens), column.accumulate)
        self.pages = Pages(column, k, self.arrays.kv_length.shape[0], chooses, config)
        columns = self.selection.shape[2]
        self.native = _native.Forward(
            self.pages.native, self.arrays.keys(k.shape[0], max_seqlen_k),
            self.arrays.batch(tokens, max_seqlen_q, max_seqlen_k),
            native_config if chooses else None, heads_q, scale,
            k=address(self.inputs[1]), v=address(self.inputs[2]), k_score=address(self.inputs[4]),
            q=address(self.inputs[0]), q_score=address(self.inputs[3]), o=address(self.out),
            lse=address(self.lse), selection=address(self.selection) if columns else 0,
            columns=columns)


implement("attention", _attention, _attention_shapes)


def _backward_shapes(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.empty(q.shape, dtype=q.dtype, device=q.device),
            torch.empty(k.shape, dtype=k.dtype, device=k.device),
            torch.empty(v.shape, dtype=v.dtype, device=v.device))


def _attention_backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, selection: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    kv_length: Tensor, page_table: Tensor, sparse: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, config: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = (cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse, max_seqlen_q, max_seqlen_k)
    _check(q, k, v, batch, config)
    check_like("out", out, q, "q")
    check_like("grad_out", grad_out, q, "q")
    check_like("grad_lse", grad_lse, lse, "lse")
    check_selection(selection, q, k.shape[1])
    column = column_of(q, backend)
    if selection is None:
        batch = (*batch[:4], None, *batch[5:])
    if grad_out is None:
        grad_out = torch.zeros_like(q)
    grad_out = column.numbers(grad_out)
    grad_lse = None if grad_lse is None else _sums(column, grad_lse)
    work = _Forward(q, k, v, None, None, selection, batch, scale, tuple(config), backend,
                    attends=True, out=column.numbers(out), lse=_sums(column, lse))
    grads = [column.empty(x.shape, column.activation) for x in (q, k, v)]
    run(column, _native.Backward(work.native, address(grad_out), address(grad_lse),
                                 *map(address, grads)))
    grad_q, grad_k, grad_v = (grad.to(q.device, q.dtype) for grad in grads)
    return grad_q, grad_k, grad_v


def _sums(column: Column, x: Tensor) -> Tensor:
    return x.to(device=column.device, dtype=column.accumulate).contiguous()


implement("attention_backward", _attention_backward, _backward_shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, _, selection, *batch, max_seqlen_q, max_seqlen_k, scale, config, backend = inputs
    out, lse, chosen = output
    if selection is None and chosen.shape[2] > 0:
        selection = chosen
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(chosen)
    ctx.save_for_backward(q, k, v, out, lse, selection, *batch)
    ctx.options = (max_seqlen_q, max_seqlen_k, scale, config, backend)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple:
    none = [None] * 13
    if grad_out is None and grad_lse is None:
        return None, None, None, *none
    grads = torch.ops.infllm.attention_backward(grad_out, grad_lse, *ctx.saved_tensors,
                                                *ctx.options)
    return *grads, *none


def _no_second(_ctx: Any, *_grads: Any) -> tuple:
    raise RuntimeError("infllm.attention: a second derivative was asked for, but there is only a "
                       "first; leave out create_graph=True")


torch.library.register_autograd("infllm::attention", _gradients, setup_context=_save, lib=library)
torch.library.register_autograd("infllm::attention_backward", _no_second, lib=library)

# ---- the choice alone -----------------------------------------------------------------------------


def _choose_shapes(
    q: Tensor, k: Tensor, q_score: Tensor | None, k_score: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, kv_length: Tensor, page_table: Tensor, sparse: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, scale: float, config: Sequence[int], backend: str,
) -> Tensor:
    numbers = _check(q, k, k, (cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse,
                               max_seqlen_q, max_seqlen_k), config)
    check_scores(q_score, k_score, q, k, numbers)
    return torch.empty((k.shape[1], q.shape[0], columns_of(numbers, sparse, max_seqlen_k)),
                       dtype=torch.int32, device=q.device)


def _choose(
    q: Tensor, k: Tensor, q_score: Tensor | None, k_score: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, kv_length: Tensor, page_table: Tensor, sparse: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, scale: float, config: Sequence[int], backend: str,
) -> Tensor:
    batch = (cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse, max_seqlen_q, max_seqlen_k)
    numbers = _check(q, k, k, batch, config)
    check_scores(q_score, k_score, q, k, numbers)
    # Pages have room for values; the keys stand in for them.
    work = _Forward(q, k, k, q_score, k_score, None, batch, scale, tuple(config), backend,
                    attends=False)
    if sparse is not None:
        run(work.column, work.native)
    return work.selection.to(q.device)


implement("choose", _choose, _choose_shapes)
