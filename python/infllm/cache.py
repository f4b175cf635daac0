# SPDX-License-Identifier: Apache-2.0
"""The paged cache of one layer, for chunked prefill and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from infllm import _native
from infllm.attention import longest, scale_of
from infllm.call import Arrays, address, columns_of, config_of, layout_of, lse_type, run
from infllm.checks import (
    check_batch,
    check_config,
    check_count,
    check_given,
    check_ints,
    check_like,
    check_qkv,
    check_scores,
    check_tensors,
    check_type,
)
from infllm.columns import Column, column_of
from infllm.config import SparseConfig
from infllm.eager import is_eager, starts
from infllm.ops import OPTIONS, implement, library
from infllm.plan import sparse_flags

_PLACES = ("Tensor cu_seqlens_q, Tensor kv_length, Tensor page_table, SymInt max_seqlen_q, "
           "SymInt max_seqlen_k")

library.define(f"cache_append_(Tensor(a!) pages, Tensor k, Tensor v, Tensor? k_score, {_PLACES}, "
               "int[] config, str backend) -> ()")
library.define(f"cache_attention(Tensor q, Tensor? q_score, Tensor pages, Tensor? sparse, "
               f"{_PLACES}, int heads_kv, {OPTIONS}) -> (Tensor, Tensor, Tensor)")


class KVCache:
    """Pages of keys, values and pooled keys of one layer.

    A page holds ``sparse_config.block_size`` tokens of one sequence. Which page holds which block
    of which sequence is the caller's: a page table int32 [B, pages], as every serving engine has.

        cache = infllm.KVCache(num_pages=128, heads_kv=2, head_dim=128, dtype=torch.bfloat16,
                               device="cuda", sparse_config=config)
        out = infllm.attend_with_kvcache(q, cache, k, v, cache_seqlens=lengths, page_table=table,
                                         max_seqlen_k=limit)
    """

    def __init__(self, num_pages: int, heads_kv: int, head_dim: int, *, dtype: torch.dtype,
                 device: torch.device | str = "cpu", sparse_config: SparseConfig | None = None,
                 backend: str | None = None) -> None:
        num_pages = check_count("num_pages", num_pages, 1)
        heads_kv = check_count("heads_kv", heads_kv, 1)
        head_dim = check_count("head_dim", head_dim, 1)
        check_type("dtype", dtype)
        check_config(sparse_config)
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError(f"device: {device}, expected cpu or cuda")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.heads_kv = heads_kv
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = device
        self.sparse_config = sparse_config
        self.backend = backend or ""
        self.numbers = sparse_config.numbers() if sparse_config is not None else []
        column = column_of(torch.empty(0, dtype=dtype, device=device), self.backend, "dtype")
        _, self.page_bytes = layout_of(column, heads_kv, head_dim, sparse_config is not None,
                                       tuple(self.numbers))
        # The pages' contents belong to the device; append() and attend_with_kvcache() know them.
        self.pages = torch.zeros((num_pages, self.page_bytes), dtype=torch.uint8,
                                 device=column.device)

    def __repr__(self) -> str:
        return (f"KVCache(num_pages={self.pages.shape[0]}, heads_kv={self.heads_kv}, "
                f"head_dim={self.head_dim}, dtype={self.dtype}, device='{self.device}', "
                f"sparse_config={self.sparse_config})")

    @property
    def block_size(self) -> int:
        """Tokens of a page."""
        return (self.sparse_config or SparseConfig()).block_size

    def append(self, k: Tensor, v: Tensor, cache_seqlens: Tensor, page_table: Tensor, *,
               cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
               max_seqlen_k: int | None = None, k_score: Tensor | None = None) -> None:
        """Writes new tokens behind what the sequences hold, and pools the keys they complete.

        Args:
            k, v: [B, Sq, Hkv, D], Sq new tokens each; or packed [T, Hkv, D] with cu_seqlens.
            cache_seqlens: int32 [B], keys that each sequence holds already.
            page_table: int32 [B, pages], the page of each block.
            cu_seqlens, max_seqlen: of packed k and v.
            max_seqlen_k: a bound on the lengths afterwards; None: what page_table has room for.
            k_score: keys before RoPE, under use_nope.
        """
        check_tensors(k=k, v=v)
        check_given(k_score=k_score)
        places = _places(self, k, cache_seqlens, page_table, cu_seqlens, max_seqlen, max_seqlen_k)
        torch.ops.infllm.cache_append_(
            self.pages, _packed(k), _packed(v), None if k_score is None else _packed(k_score),
            *places, self.numbers, self.backend)


@overload
def attend_with_kvcache(
    q: Tensor, cache: KVCache, k: Tensor | None = ..., v: Tensor | None = ..., *,
    cache_seqlens: Tensor, page_table: Tensor, cu_seqlens_q: Tensor | None = ...,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ...,
    softmax_scale: float | None = ..., sparse: bool | Tensor | None = ...,
    q_score: Tensor | None = ..., k_score: Tensor | None = ...,
    return_softmax_lse: Literal[False] = ..., return_selection: Literal[False] = ...,
) -> Tensor: ...


@overload
def attend_with_kvcache(
    q: Tensor, cache: KVCache, k: Tensor | None = ..., v: Tensor | None = ..., *,
    cache_seqlens: Tensor, page_table: Tensor, cu_seqlens_q: Tensor | None = ...,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ...,
    softmax_scale: float | None = ..., sparse: bool | Tensor | None = ...,
    q_score: Tensor | None = ..., k_score: Tensor | None = ...,
    return_softmax_lse: bool = ..., return_selection: bool = ...,
) -> tuple[Tensor, ...]: ...


def attend_with_kvcache(
    q: Tensor,
    cache: KVCache,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    sparse: bool | Tensor | None = None,
    q_score: Tensor | None = None,
    k_score: Tensor | None = None,
    return_softmax_lse: bool = False,
    return_selection: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Causal attention of new tokens over a paged cache, dense or over the blocks that matter.

    Shapes and switches are those of ``infllm.attention``; nothing waits for the device, so a
    decode step can be captured in a CUDA graph and replayed while the lengths grow. There are no
    gradients: the results do not require any.

    Args:
        q: [B, Sq, Hq, D], Sq new tokens each (1 while decoding); or packed [T, Hq, D] with
            cu_seqlens_q.
        k, v: [B, Sq, Hkv, D], the new tokens' keys and values, appended first. None: they are in
            the cache already.
        cache_seqlens: int32 [B], keys in the cache before k; with k None, all keys, q's included.
        page_table: int32 [B, pages].
        max_seqlen_k: a bound on the lengths, k included; None: what page_table has room for.
        sparse: None switches each sequence by dense_len on its length; or bool, or bool [B].

    Returns:
        out like q, or a tuple (out, lse [Hq, T], selection [Hkv, T, K]) of what was asked for.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: {type(cache).__name__}, expected infllm.KVCache")
    check_tensors(q=q)
    check_given(k=k, v=v, q_score=q_score, k_score=k_score)
    if (k is None) != (v is None):
        raise ValueError("k and v: one of them is missing, expected both or none")
    places = _places(cache, q, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, max_seqlen_k,
                     appends=k is not None)
    config = cache.sparse_config
    cu, kv_length, table, longest_q, longest_k = places
    flags = sparse_flags(kv_length, longest_k, config, sparse)
    inputs: Any = [None if x is None else _packed(x) for x in (q, q_score, k, v, k_score)]
    scale = scale_of(q, softmax_scale)
    if is_eager(*inputs, cache.pages, flags, cu, kv_length, table):
        out, lse, chosen = _step(cache, inputs, flags, places, scale)
    else:
        packed_q, packed_q_score, packed_k, packed_v, packed_k_score = inputs
        if packed_k is not None:
            torch.ops.infllm.cache_append_(cache.pages, packed_k, packed_v, packed_k_score,
                                           *places, cache.numbers, cache.backend)
        out, lse, chosen = torch.ops.infllm.cache_attention(
            packed_q, packed_q_score, cache.pages, flags, *places, cache.heads_kv, scale,
            cache.numbers, cache.backend)
    results = [out.view(q.shape)]
    if return_softmax_lse:
        results.append(lse)
    if return_selection:
        results.append(chosen)
    return results[0] if len(results) == 1 else tuple(results)


def _packed(x: Tensor) -> Tensor:
    x = x.detach() if x.requires_grad else x
    return x.flatten(0, 1) if x.dim() == 4 else x


def _places(cache: KVCache, x: Tensor, held: Tensor, page_table: Tensor,
            cu_seqlens: Tensor | None, max_seqlen: int | None, max_seqlen_k: int | None,
            appends: bool = True) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Where the new tokens go: starts, lengths afterwards, pages, the longest of both. Without
    appending, ``held`` is the lengths afterwards."""
    check_ints("cache_seqlens", held, "[B]")
    check_tensors(page_table=page_table)
    if held.device != cache.device:
        raise ValueError(f"cache_seqlens: on {held.device}, expected {cache.device}, as the cache")
    if x.dtype is not cache.dtype or x.shape[-1] != cache.head_dim or x.device != cache.device:
        raise ValueError(f"q, k and v: {x.dtype} {list(x.shape)} on {x.device}, expected "
                         f"{cache.dtype} [..., {cache.head_dim}] on {cache.device}, as the cache")
    if page_table.dim() != 2 or page_table.dtype is not torch.int32:
        raise ValueError(f"page_table: {page_table.dtype} {list(page_table.shape)}, expected int32 "
                         "[B, pages]")
    new: int | Tensor
    if cu_seqlens is None:
        if x.dim() != 4 or x.shape[0] != held.shape[0]:
            raise ValueError(f"q, k and v: {list(x.shape)} without cu_seqlens_q, expected "
                             f"[{held.shape[0]}, Sq, H, D]")
        new = max_seqlen = x.shape[1]
        if is_eager(x):
            cu_seqlens = starts(x.shape[0], new, x.device)
        else:
            cu_seqlens = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * new
    else:
        max_seqlen = check_count("max_seqlen_q", longest("max_seqlen_q", max_seqlen, cu_seqlens))
        check_ints("cu_seqlens_q", cu_seqlens, "[B + 1]")
        if cu_seqlens.shape[0] - 1 != held.shape[0]:
            raise ValueError(f"cu_seqlens_q: {cu_seqlens.shape[0] - 1} sequences, but "
                             f"cache_seqlens has {held.shape[0]}; expected as many")
        new = cu_seqlens.diff()
    room = page_table.shape[1] * cache.block_size
    return (cu_seqlens, held + new if appends else held, page_table, max_seqlen,
            room if max_seqlen_k is None else check_count("max_seqlen_k", max_seqlen_k))


def _native_pages(column: Column, pages: Tensor, heads_kv: int, head_dim: int,
                  config: Sequence[int]) -> Any:
    layout, page_bytes = layout_of(column, heads_kv, head_dim, len(config) > 0, tuple(config))
    if (pages.dtype != torch.uint8 or pages.dim() != 2 or pages.shape[1] != page_bytes
            or not pages.is_contiguous() or pages.device != column.device):
        raise ValueError(f"pages: {pages.dtype} {list(pages.shape)} on {pages.device}, expected "
                         f"uint8 [num_pages, {page_bytes}] on {column.device}")
    return _native.KvPages(pages.data_ptr(), layout, page_bytes, pages.shape[0])


def _check_places(x: Tensor, cu_seqlens_q: Tensor, kv_length: Tensor, page_table: Tensor,
                  sparse: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
                  config: Sequence[int]) -> SparseConfig:
    numbers, _ = config_of(tuple(config))
    check_batch(x, cu_seqlens_q, cu_seqlens_q, kv_length, page_table, sparse, max_seqlen_q,
                max_seqlen_k, numbers)
    return numbers


def _append_nothing(pages: Tensor, k: Tensor, v: Tensor, k_score: Tensor | None,
                    cu_seqlens_q: Tensor, kv_length: Tensor, page_table: Tensor,
                    max_seqlen_q: int, max_seqlen_k: int, config: Sequence[int],
                    backend: str) -> None:
    check_qkv(k, k, v)
    check_like("k_score", k_score, k, "k")
    _check_places(k, cu_seqlens_q, kv_length, page_table, None, max_seqlen_q, max_seqlen_k, config)


def _step(cache: KVCache, inputs: Sequence[Any], flags: Tensor | None,
          places: tuple[Tensor, Tensor, Tensor, int, int], scale: float,
          ) -> tuple[Tensor, Tensor, Tensor]:
    """Appends and attends in one go; inputs are q, q_score, k, v and k_score, packed."""
    q, q_score, k, v, k_score = inputs
    chosen = _check_step(q, q_score, flags, *places, cache.heads_kv, cache.numbers)
    if k is not None:
        check_qkv(q, k, v)
        if k.shape[:2] != (q.shape[0], cache.heads_kv):
            raise ValueError(f"k: {k.shape[0]} tokens with {k.shape[1]} heads, expected "
                             f"{q.shape[0]} as in q with {cache.heads_kv} as in the cache")
        check_like("k_score", k_score, k, "k")
    return _run(q, q_score, k, v, k_score, cache.pages, flags, places, cache.heads_kv, scale,
                cache.numbers, cache.backend, chosen)


def _run(q: Tensor, q_score: Tensor | None, k: Tensor | None, v: Tensor | None,
         k_score: Tensor | None, pages: Tensor, flags: Tensor | None,
         places: tuple[Tensor, Tensor, Tensor, int, int], heads_kv: int, scale: float,
         config: Sequence[int], backend: str, chosen: tuple[int, int, int],
         ) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens_q, kv_length, page_table, longest_q, longest_k = places
    column = column_of(q, backend)
    _, native_config = config_of(tuple(config))
    arrays = Arrays(column, cu_seqlens_q, cu_seqlens_q, kv_length, page_table, flags)
    queries, keys, values = (None if x is None else column.numbers(x) for x in (q, k, v))
    scored, scored_keys = (None if x is None else column.numbers(x) for x in (q_score, k_score))
    out = column.empty(q.shape, column.activation)
    lse = column.empty((q.shape[1], q.shape[0]), column.accumulate)
    selection = torch.full(chosen, -1, dtype=torch.int32, device=column.device) \
        if chosen[2] else column.empty(chosen, torch.int32)
    batch = arrays.batch(q.shape[0], longest_q, longest_k)
    new = batch if k is None else arrays.batch(q.shape[0], longest_q, longest_k, dense=True)
    work = _native.Forward(
        _native_pages(column, pages, heads_kv, q.shape[2], config), new, batch,
        native_config if flags is not None else None, q.shape[1], scale, address(keys),
        address(values), address(scored_keys), address(queries), address(scored), address(out),
        address(lse), address(selection) if chosen[2] else 0, chosen[2])
    try:
        run(column, work)
    except ValueError:
        arrays.check_lengths(q.shape[0], longest_q)
        raise
    if column.device == q.device and column.activation is q.dtype:
        return out, lse, selection
    return out.to(q.device, q.dtype), lse.to(q.device, lse_type(q)), selection.to(q.device)


def _cache_append(pages: Tensor, k: Tensor, v: Tensor, k_score: Tensor | None,
                  cu_seqlens_q: Tensor, kv_length: Tensor, page_table: Tensor, max_seqlen_q: int,
                  max_seqlen_k: int, config: Sequence[int], backend: str) -> None:
    _append_nothing(pages, k, v, k_score, cu_seqlens_q, kv_length, page_table, max_seqlen_q,
                    max_seqlen_k, config, backend)
    column = column_of(k, backend)
    arrays = Arrays(column, cu_seqlens_q, cu_seqlens_q, kv_length, page_table, None)
    keys, values = column.numbers(k), column.numbers(v)
    scores = None if k_score is None else column.numbers(k_score)
    native_pages = _native_pages(column, pages, k.shape[1], k.shape[2], config)
    try:
        _native.append(column.native, column.stream(), native_pages,
                       arrays.batch(k.shape[0], max_seqlen_q, max_seqlen_k), address(keys),
                       address(values), address(scores))
    except ValueError:
        arrays.check_lengths(k.shape[0], max_seqlen_q)
        raise


implement("cache_append_", _cache_append, _append_nothing)


def _check_step(q: Tensor, q_score: Tensor | None, sparse: Tensor | None, cu_seqlens_q: Tensor,
                kv_length: Tensor, page_table: Tensor, max_seqlen_q: int, max_seqlen_k: int,
                heads_kv: int, config: Sequence[int]) -> tuple[int, int, int]:
    """The selection's shape."""
    if q.dim() != 3:
        raise ValueError(f"q: {list(q.shape)}, expected [T, Hq, D]")
    numbers = _check_places(q, cu_seqlens_q, kv_length, page_table, sparse, max_seqlen_q,
                            max_seqlen_k, config)
    if sparse is not None:
        check_scores(q_score, q_score, q, q, numbers)
    return heads_kv, q.shape[0], columns_of(numbers, sparse, max_seqlen_k)


def _cache_shapes(q: Tensor, q_score: Tensor | None, pages: Tensor, sparse: Tensor | None,
                  cu_seqlens_q: Tensor, kv_length: Tensor, page_table: Tensor, max_seqlen_q: int,
                  max_seqlen_k: int, heads_kv: int, scale: float, config: Sequence[int],
                  backend: str) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _check_step(q, q_score, sparse, cu_seqlens_q, kv_length, page_table, max_seqlen_q,
                         max_seqlen_k, heads_kv, config)
    return (torch.empty(q.shape, dtype=q.dtype, device=q.device),
            torch.empty((q.shape[1], q.shape[0]), dtype=lse_type(q), device=q.device),
            torch.empty(chosen, dtype=torch.int32, device=q.device))


def _cache_attention(q: Tensor, q_score: Tensor | None, pages: Tensor, sparse: Tensor | None,
                     cu_seqlens_q: Tensor, kv_length: Tensor, page_table: Tensor,
                     max_seqlen_q: int, max_seqlen_k: int, heads_kv: int, scale: float,
                     config: Sequence[int], backend: str) -> tuple[Tensor, Tensor, Tensor]:
    places = (cu_seqlens_q, kv_length, page_table, max_seqlen_q, max_seqlen_k)
    chosen = _check_step(q, q_score, sparse, *places, heads_kv, config)
    return _run(q, q_score, None, None, None, pages, sparse, places, heads_kv, scale, config,
                backend, chosen)


implement("cache_attention", _cache_attention, _cache_shapes)
