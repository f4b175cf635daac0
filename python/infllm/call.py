# SPDX-License-Identifier: Apache-2.0
"""One call of the native side: checks, types, memory, and what a plan's calls have in common."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infllm import _native
from infllm.checks import (
    check_batch,
    check_lengths,
    check_qkv,
    check_scores,
    check_selected_blocks,
    check_selection,
    check_starts,
    check_tails,
)
from infllm.columns import Column, column_of
from infllm.config import SparseConfig
from infllm.plan import Batch, page_count


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


def columns_of(config: SparseConfig, sparse: Tensor | None, max_seqlen_k: int) -> int:
    return 0 if sparse is None else config.columns(max_seqlen_k)


class Arrays:
    """A batch's arrays on its column. Keeps them alive while the native side holds addresses."""

    def __init__(self, column: Column, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                 kv_length: Tensor, page_table: Tensor, sparse: Tensor | None) -> None:
        self.cu_seqlens_q = column.place(cu_seqlens_q)
        self.cu_seqlens_k = column.place(cu_seqlens_k)
        self.kv_length = column.place(kv_length)
        self.page_table = column.place(page_table)
        self.sparse = None if sparse is None else column.place(sparse)

    def check_starts(self, tokens_q: int, tokens_k: int, max_seqlen_q: int,
                     max_seqlen_k: int) -> None:
        """Looks at a host's cu_seqlens once the native side has refused them, to say so in the
        caller's words."""
        if self.cu_seqlens_q.device.type == "cpu":
            check_tails(check_starts("q", self.cu_seqlens_q, tokens_q, max_seqlen_q),
                        check_starts("k", self.cu_seqlens_k, tokens_k, max_seqlen_k))

    def check_lengths(self, tokens: int, max_seqlen: int) -> None:
        """The same for new tokens of a cache."""
        if self.cu_seqlens_q.device.type == "cpu":
            check_lengths(check_starts("q", self.cu_seqlens_q, tokens, max_seqlen),
                          self.kv_length.tolist())

    def batch(self, tokens: int, max_seqlen_q: int, max_seqlen_k: int, *,
              dense: bool = False) -> Any:
        """The plan of a step over q. dense: whatever the flags say."""
        return _native.Batch(self.kv_length.shape[0], tokens, self.cu_seqlens_q.data_ptr(),
                             self.kv_length.data_ptr(), self.page_table.data_ptr(),
                             self.page_table.shape[1], 0 if dense else address(self.sparse),
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


class Call:
    """Attention over one plan with tensors of one shape and type: checked once, then reused.

    Args:
        q, k, v: packed; only what they look like matters.
        batch: the fields of an ``infllm.Plan``.
        config: ``SparseConfig.numbers()``, or empty.
        chooses: whether blocks are chosen here, rather than given or not needed.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch,
                 config: Sequence[int], backend: str, *, chooses: bool) -> None:
        max_seqlen_q, max_seqlen_k = batch[5:]
        numbers = tuple(config)
        self.config, native_config = config_of(numbers)
        check_qkv(q, k, v)
        check_batch(q, *batch, self.config)
        column = self.column = column_of(q, backend)
        self.arrays = Arrays(column, *batch[:5])
        self.chooses = chooses and self.arrays.sparse is not None
        self.native_config = native_config if self.chooses else None
        self.columns = columns_of(self.config, self.arrays.sparse, max_seqlen_k) if chooses else 0
        self.blocks = self.config.blocks_in(max_seqlen_k)
        self.layout, self.page_bytes = layout_of(column, k.shape[1], k.shape[2], self.chooses,
                                                 numbers)
        self.pages = page_count(k.shape[0], self.arrays.kv_length.shape[0], self.config)
        self.keys = self.arrays.keys(k.shape[0], max_seqlen_k)
        self.batch = self.arrays.batch(q.shape[0], max_seqlen_q, max_seqlen_k)
        self.heads_q = q.shape[1]
        self.rows = (k.shape[1], q.shape[0])
        self.lengths = (q.shape[0], k.shape[0], max_seqlen_q, max_seqlen_k)
        self.lse_shape = (q.shape[1], q.shape[0])
        self.device, self.dtype, self.lse_dtype = q.device, q.dtype, lse_type(q)
        self.workspace: dict[str, int] = {}

    def check(self, q: Tensor, k: Tensor, q_score: Tensor | None, k_score: Tensor | None,
              selection: Tensor | None) -> None:
        """The tensors that the call was not made for."""
        if selection is None:
            check_scores(q_score, k_score, q, k, self.config)
        else:
            self.check_selection(selection, q)

    def check_selection(self, selection: Tensor, q: Tensor) -> None:
        """Blocks that somebody else chose; a device masks what it must not follow."""
        check_selection(selection, q, self.rows[0])
        if not self.column.is_cuda:
            check_selected_blocks(selection, self.blocks)

    def blocks_for(self, selection: Tensor | None) -> Tensor | None:
        """Where the selection is, or will be; rows that nobody writes are -1. None: nowhere."""
        if selection is not None:
            return self.column.place(selection)
        if self.columns == 0:
            return None
        return torch.full((*self.rows, self.columns), -1, dtype=torch.int32,
                          device=self.column.device)

    def no_blocks(self) -> Tensor:
        """The selection where nothing can be chosen."""
        return torch.empty((*self.rows, 0), dtype=torch.int32, device=self.device)

    def describe(self, memory: Tensor, inputs: Sequence[Tensor | None], blocks: Tensor | None,
                 out: Tensor | None, lse: Tensor | None, scale: float) -> Any:
        """The native description of a forward pass; inputs are q, k, v, q_score and k_score."""
        q, k, v, q_score, k_score = map(address, inputs)
        pages = _native.KvPages(memory.data_ptr(), self.layout, self.page_bytes, self.pages)
        return _native.Forward(
            pages, self.keys, self.batch, self.native_config, self.heads_q, scale, k, v, k_score,
            q, q_score, address(out), address(lse), address(blocks),
            0 if blocks is None else blocks.shape[2])

    def run(self, name: str, work: Any) -> None:
        """Starts a Forward or Backward. A host looks into the arrays each time, a device once."""
        column = self.column
        needed = self.workspace.get(name) if column.is_cuda else None
        try:
            if needed is None:
                needed = self.workspace[name] = work.workspace_bytes(column.native)
            workspace = column.bytes(needed)
            work.run(column.native, column.stream(), workspace.data_ptr(), needed)
        except ValueError:
            self.arrays.check_starts(*self.lengths)
            raise

    def result(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A result where the caller's tensors are."""
        return x if x.dtype is dtype and x.device == self.device else x.to(self.device, dtype)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, q_score: Tensor | None,
               k_score: Tensor | None) -> list[Tensor | None]:
        """The tensors as the column reads them."""
        column = self.column
        nope = self.chooses and self.config.use_nope
        return [column.numbers(q), column.numbers(k), column.numbers(v),
                *(column.numbers(x) if nope and x is not None else None
                  for x in (q_score, k_score))]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, q_score: Tensor | None,
                k_score: Tensor | None, selection: Tensor | None, scale: float,
                ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output, log-sum-exp and the blocks that were chosen, if any were."""
        column = self.column
        inputs = self.inputs(q, k, v, q_score, k_score)
        blocks = self.blocks_for(selection)
        memory = column.bytes(self.pages * self.page_bytes)
        out = column.empty(q.shape, column.activation)
        lse = column.empty(self.lse_shape, column.accumulate)
        self.run("attention", self.describe(memory, inputs, blocks, out, lse, scale))
        if selection is None and blocks is not None:
            blocks = self.result(blocks, torch.int32)
        else:
            blocks = None
        return self.result(out, self.dtype), self.result(lse, self.lse_dtype), blocks

    def choose(self, q: Tensor, k: Tensor, q_score: Tensor | None, k_score: Tensor | None,
               scale: float) -> Tensor:
        """The blocks alone."""
        blocks = self.blocks_for(None)
        if blocks is None:
            return self.no_blocks()
        # Pages have room for values; the keys stand in for them.
        inputs = self.inputs(q, k, k, q_score, k_score)
        memory = self.column.bytes(self.pages * self.page_bytes)
        self.run("choose", self.describe(memory, inputs, blocks, None, None, scale))
        return self.result(blocks, torch.int32)

    def backward(self, grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor,
                 v: Tensor, out: Tensor, lse: Tensor, selection: Tensor | None, scale: float,
                 ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        column = self.column
        grad_out = column.numbers(torch.zeros_like(q) if grad_out is None else grad_out)
        grad_lse = None if grad_lse is None else column.sums(grad_lse)
        inputs = self.inputs(q, k, v, None, None)
        out, lse = column.numbers(out), column.sums(lse)
        blocks = self.blocks_for(selection)
        memory = column.bytes(self.pages * self.page_bytes)
        grads = [column.empty(x.shape, column.activation) for x in (q, k, v)]
        work = self.describe(memory, inputs, blocks, out, lse, scale)
        self.run("backward", _native.Backward(work, grad_out.data_ptr(), address(grad_lse),
                                              *map(address, grads)))
        grad_q, grad_k, grad_v = (self.result(grad, self.dtype) for grad in grads)
        return grad_q, grad_k, grad_v
