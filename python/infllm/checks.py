# SPDX-License-Identifier: Apache-2.0
"""What the operators ask of their tensors: messages name the argument, what was found and what was
expected. They run while tracing, too."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from infllm.config import SparseConfig

_MOST = 2**31 - 1  # tokens and pages are counted in 32 bits


_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _fail(name: str, x: Tensor, expected: str) -> None:
    raise ValueError(f"{name}: {x.dtype} {list(x.shape)} on {x.device}, expected {expected}")


def check_tensors(**tensors: Any) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: {type(x).__name__}, expected a torch.Tensor")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"{name}: {'nested' if x.is_nested else x.layout}, expected a dense "
                            "tensor; sequences of several lengths are packed, with cu_seqlens")


def check_given(**tensors: Any) -> None:
    """Tensors that may be left out."""
    check_tensors(**{name: x for name, x in tensors.items() if x is not None})


def check_type(name: str, dtype: Any) -> None:
    """A type that attention computes in."""
    if dtype not in _TYPES:
        raise TypeError(f"{name}: {dtype}, expected one of "
                        f"{', '.join(str(known) for known in _TYPES)}")


def check_ints(name: str, x: Any, shape: str) -> None:
    """An int32 array of one dimension, such as cu_seqlens."""
    check_tensors(**{name: x})
    if x.dtype is not torch.int32 or x.dim() != 1 or (shape == "[B + 1]" and x.shape[0] < 1):
        raise ValueError(f"{name}: {x.dtype} {list(x.shape)}, expected int32 {shape}")


def check_count(name: str, x: Any, least: int = 0) -> int:
    """A number of tokens, pages or heads."""
    try:
        count: Any = x if isinstance(x, (int, torch.SymInt)) else operator.index(x)
    except TypeError:
        raise TypeError(f"{name}: {x!r}, expected an int") from None
    if count < least:
        raise ValueError(f"{name}: {count}, expected at least {least}")
    return count


def check_switch(sparse: Any) -> None:
    """What overrules dense_len."""
    if sparse is not None and not isinstance(sparse, (bool, Tensor)):
        raise TypeError(f"sparse: {sparse!r}, expected None, a bool or a bool tensor [B]")


def check_config(config: Any, *, needed: bool = False) -> None:
    if isinstance(config, SparseConfig) or (config is None and not needed):
        return
    hint = "; SparseConfig.from_dict makes one of it" if isinstance(config, dict) else ""
    raise TypeError(f"sparse_config: {type(config).__name__}, expected infllm.SparseConfig{hint}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [T, Hq, D], k and v [S, Hkv, D], of one type on one device."""
    if q.dim() != 3:
        _fail("q", q, "[T, Hq, D]")
    if k.dim() != 3 or k.shape[2] != q.shape[2] or k.dtype != q.dtype or k.device != q.device:
        _fail("k", k, f"{q.dtype} [S, Hkv, {q.shape[2]}] on {q.device}, as q")
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        _fail("v", v, f"{k.dtype} {list(k.shape)} on {k.device}, as k")
    if k.shape[1] < 1 or q.shape[1] < 1 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q: {q.shape[1]} heads for {k.shape[1]} KV heads, expected a multiple")
    if q.shape[2] < 1:
        _fail("q", q, "a head dimension of at least 1")
    if q.shape[0] > _MOST or k.shape[0] > _MOST:
        raise ValueError(f"q and k: {q.shape[0]} and {k.shape[0]} tokens, expected below 2 ** 31")


def check_like(name: str, x: Tensor | None, like: Tensor, like_name: str) -> None:
    if x is not None and (x.shape != like.shape or x.dtype != like.dtype
                          or x.device != like.device):
        _fail(name, x, f"{like.dtype} {list(like.shape)} on {like.device}, as {like_name}")


def check_scores(q_score: Tensor | None, k_score: Tensor | None, q: Tensor, k: Tensor,
                 config: SparseConfig | None) -> None:
    """The tensors before RoPE are there exactly under use_nope."""
    wanted = config is not None and config.use_nope
    for name, x in (("q_score", q_score), ("k_score", k_score)):
        if wanted and x is None:
            raise ValueError(f"{name}: missing, expected the tensor before RoPE (use_nope)")
        if not wanted and x is not None:
            raise ValueError(f"{name}: given, but sparse_config.use_nope is not set")
    check_like("q_score", q_score, q, "q")
    check_like("k_score", k_score, k, "k")


def check_batch(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_length: Tensor,
                page_table: Tensor, sparse: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
                config: SparseConfig) -> None:
    """The arrays of a plan: shapes, types, and that they are where q is."""
    sequences = kv_length.shape[0]
    for name, x, shape in (("cu_seqlens_q", cu_seqlens_q, [sequences + 1]),
                           ("cu_seqlens_k", cu_seqlens_k, [sequences + 1]),
                           ("kv_length", kv_length, [sequences])):
        if x.dtype != torch.int32 or list(x.shape) != shape or x.device != q.device:
            _fail(name, x, f"int32 {shape} on {q.device}")
    if max_seqlen_q < 0 or max_seqlen_k < 0 or max_seqlen_k > _MOST:
        raise ValueError(f"max_seqlen_q, max_seqlen_k: {max_seqlen_q}, {max_seqlen_k}, expected "
                         "0 to 2 ** 31 - 1")
    if max_seqlen_q > max_seqlen_k:
        raise ValueError(f"max_seqlen_q: {max_seqlen_q}, expected at most max_seqlen_k = "
                         f"{max_seqlen_k}: queries are the last of the keys' tokens")
    blocks = config.blocks_in(max_seqlen_k)
    if (page_table.dtype != torch.int32 or page_table.dim() != 2
            or page_table.shape[0] != sequences or page_table.shape[1] < blocks
            or page_table.device != q.device):
        _fail("page_table", page_table,
              f"int32 [{sequences}, at least {blocks}] on {q.device} for max_seqlen_k = "
              f"{max_seqlen_k}")
    if sparse is not None and (sparse.dtype != torch.bool or list(sparse.shape) != [sequences]
                               or sparse.device != q.device):
        _fail("sparse", sparse, f"bool [{sequences}] on {q.device}")


def check_selection(selection: Tensor | None, q: Tensor, heads_kv: int) -> None:
    if selection is None:
        return
    expected = f"int32 [{heads_kv}, {q.shape[0]}, K] on {q.device} with K >= 1"
    if (selection.dtype != torch.int32 or selection.dim() != 3 or selection.shape[2] < 1
            or selection.shape[0] != heads_kv or selection.shape[1] != q.shape[0]
            or selection.device != q.device):
        _fail("selection", selection, expected)


def check_selected_blocks(selection: Tensor, blocks: int) -> None:
    """Of a host's selection, whose contents cost nothing to look at; a device masks such blocks."""
    if selection.numel() == 0:
        return
    low, high = int(selection.min()), int(selection.max())
    if low < -1 or high >= blocks:
        raise ValueError(f"selection: block {low if low < -1 else high}, expected -1 to "
                         f"{blocks - 1}")
    left, right = selection[..., :-1], selection[..., 1:]
    if not bool(((right == -1) | ((right > left) & (left >= 0))).all()):
        raise ValueError("selection: expected ascending blocks in each row, -1 behind the last")


def check_starts(name: str, cu_seqlens: Tensor, tokens: int, longest: int) -> list[int]:
    """The lengths of a host's packed sequences, if they are those of q or k (``name``)."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0:
        raise ValueError(f"cu_seqlens_{name}: begins at {starts[0]}, expected 0")
    lengths = [b - a for a, b in zip(starts, starts[1:])]
    for i, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"cu_seqlens_{name}: falls from {starts[i]} to {starts[i + 1]}, "
                             "expected it to rise")
    if starts[-1] != tokens:
        raise ValueError(f"cu_seqlens_{name}: ends at {starts[-1]}, expected {tokens}, the tokens "
                         f"of {name}")
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_seqlen_{name}: {longest}, but the longest sequence has "
                         f"{max(lengths)} tokens; pass at least that")
    return lengths


def check_tails(lengths_q: list[int], lengths_k: list[int]) -> None:
    """Queries are the last of their sequence's tokens."""
    for i, (queries, keys) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        if queries > keys:
            raise ValueError(f"cu_seqlens_q: sequence {i} has {queries} queries for {keys} keys, "
                             "expected at most as many: they are the last of the keys' tokens")


def check_lengths(new: list[int], held: list[int]) -> None:
    """A cache's sequences hold at least their new tokens."""
    for i, (tokens, keys) in enumerate(zip(new, held, strict=True)):
        if keys < tokens:
            raise ValueError(f"cache_seqlens: sequence {i} has {keys} keys, its {tokens} new "
                             f"tokens included, expected at least {tokens}")
