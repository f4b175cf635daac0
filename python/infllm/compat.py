# SPDX-License-Identifier: Apache-2.0
"""The names and argument order of the published package ``infllm_v2``.

    import infllm.compat
    infllm.compat.install()       # from here on `import infllm_v2` is this module

Remote code of released checkpoints then finds what it imports. Attention runs on our kernels, for
any group size; stage 1 and the pooling, whose interface is one array entry for each token and
window, are plain PyTorch. ``infllm.attention`` does both in one step, without that array.
What we do not do (dropout, sliding windows, ALiBi, soft capping) is refused, never ignored.

The package changed in August 2025. Code written before (the first of MiniCPM4) leaves the local
blocks out of ``topk_idx`` and passes ``block_window_size``; ``install(block_window=True)`` is for
it. Code written for one is refused by the other.
"""

from __future__ import annotations

import functools
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import infllm
from infllm.attention import attention
from infllm.checks import check_given, check_tensors
from infllm.config import SparseConfig

_BLOCK = 64
_COMPRESSED_STRIDE = 16  # tokens between the windows that stage 1 scores


def install(name: str = "infllm_v2", *, block_window: bool = False) -> None:
    """Makes ``import infllm_v2`` give this module's functions. Opt-in: nothing else calls it.

    Args:
        block_window: for remote code that passes ``block_window_size``: pooling then scores the
            local blocks last, because attention adds them.
    """
    module = types.ModuleType(name, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    functions: list[Callable[..., Any]] = [
        infllmv2_attn_stage1, topk_to_uint64, blockmask_to_uint64, uint64_to_bool,
        _expecting_window(infllmv2_attn_varlen_func, block_window),
        _expecting_window(infllmv2_attn_with_kvcache, block_window)]
    module.__dict__.update({function.__name__: function for function in functions},
                           __version__=infllm.__version__)
    for pooling in (max_pooling_1d, max_pooling_1d_varlen):
        module.__dict__[pooling.__name__] = (
            functools.partial(pooling, local_score=-torch.inf) if block_window else pooling)
    sys.modules[name] = module


def _expecting_window(function: Callable[..., Any], expected: bool) -> Callable[..., Any]:
    """The function, refusing calls of the generation of remote code that was not installed for."""
    @functools.wraps(function)
    def checked(*args: Any, **rest: Any) -> Any:
        window = rest.get("block_window_size", 0)
        if rest.get("topk_idx") is not None and (window > 0) != expected:
            raise NotImplementedError(
                f"block_window_size = {window}: this model's code is of the "
                f"{'first' if window else 'later'} kind; call infllm.compat.install("
                f"block_window={window > 0}) before loading it")
        return function(*args, **rest)

    return checked


def _refuse(**given: tuple[Any, Any]) -> None:
    for name, (value, expected) in given.items():
        same = value is None if expected is None else value == expected
        if not same:
            found = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{name} = {found}, expected {expected!r}: this package does "
                                      "not do the other")


def _causal_enough(causal: bool, max_seqlen_q: int) -> None:
    if not causal and max_seqlen_q > 1:
        raise NotImplementedError(f"causal = False with {max_seqlen_q} queries, expected causal = "
                                  "True; a single query sees all keys either way")


def infllmv2_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Tensor | None = None,
    topk_idx: Tensor | None = None, block_window_size: int = 0,
) -> Tensor:
    """Attention over the blocks of topk_idx [Hkv, T, K] (-1: none), or all blocks; differentiable.

    q is [T, Hq, D], k and v are [S, Hkv, D]. Always deterministic. block_window_size: so many
    blocks up to a token's own are attended to whether chosen or not.
    """
    _refuse(dropout_p=(dropout_p, 0.0), window_size=(tuple(window_size), (-1, -1)),
            softcap=(softcap, 0.0), alibi_slopes=(alibi_slopes, None),
            return_attn_probs=(return_attn_probs, False), block_table=(block_table, None))
    check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    max_seqlen_q, max_seqlen_k = int(max_seqlen_q), int(max_seqlen_k)
    _causal_enough(causal, max_seqlen_q)
    rest: dict[str, Any] = {}
    if topk_idx is not None:
        held = cu_seqlens_k.diff() - cu_seqlens_q.diff()
        positions, _ = _places(cu_seqlens_q, held, q.shape[0])
        _check_blocks(topk_idx, k.shape[1], q.shape[0])
        rest = _over_blocks(topk_idx, positions, max_seqlen_k, block_window_size)
    return attention(q, k, v, cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32),
                     max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale, **rest)


def _places(cu_seqlens: Tensor, held: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of ``total`` packed tokens behind ``held`` [B] others: their positions and sequences."""
    tokens = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    sequence = sequence.clamp(max=cu_seqlens.shape[0] - 2)
    return tokens - cu_seqlens[sequence] + held[sequence], sequence


def _check_blocks(topk_idx: Tensor, heads_kv: int, tokens: int) -> None:
    check_tensors(topk_idx=topk_idx)
    if topk_idx.dim() != 3 or topk_idx.shape[:2] != (heads_kv, tokens) or topk_idx.shape[2] < 1:
        raise ValueError(f"topk_idx: {list(topk_idx.shape)}, expected [{heads_kv}, {tokens}, K] "
                         "with K >= 1")


def _over_blocks(topk_idx: Tensor, positions: Tensor, max_seqlen_k: int,
                 window: int) -> dict[str, Any]:
    """Arguments of ``attention``: the blocks of topk_idx and, if asked for, the local ones."""
    none = -(-max_seqlen_k // _BLOCK)  # an index behind every block
    chosen = topk_idx.to(torch.int32)
    chosen = torch.where((chosen >= 0) & (chosen < none), chosen, none)
    if window > 0:
        own = (positions // _BLOCK).to(torch.int32)[:, None]
        local = own - torch.arange(window - 1, -1, -1, dtype=torch.int32, device=own.device)
        local = torch.where(local >= 0, local, none).expand(chosen.shape[0], -1, -1)
        chosen = torch.where(chosen <= own - window, chosen, none)
        chosen = torch.cat([chosen, local], -1).sort(-1).values
    return {"sparse_config": SparseConfig(), "sparse": True,
            "selection": torch.where(chosen < none, chosen, -1)}


@torch.no_grad()
def infllmv2_attn_stage1(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    cu_seqlens_v: Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = True, block_table: Tensor | None = None,
) -> Tensor:
    """Scores of the pooled keys k, [W, Hkv, D], normalised by the coarser ones v, [W2, Hkv, D].

    Without cu_seqlens_v, or where a sequence has as many in v as in k, k normalises itself.
    Returns [Hkv, T, max_seqlen_k] in q's type, summed over the group's heads; 0 where nothing is
    visible. With causal, q are a sequence's first tokens and k its windows of 32 every 16.
    """
    check_tensors(q=q, k=k, v=v)
    if cu_seqlens_v is None:
        v, cu_seqlens_v = k, cu_seqlens_k
    elif not isinstance(cu_seqlens_v, Tensor):
        raise TypeError(f"cu_seqlens_v: {cu_seqlens_v!r}, expected a tensor or None; before it "
                        "was an argument max_seqlen_q stood here: pass that by name")
    _refuse(dropout_p=(dropout_p, 0.0), window_size=(tuple(window_size), (-1, -1)),
            softcap=(softcap, 0.0), alibi_slopes=(alibi_slopes, None),
            return_attn_probs=(return_attn_probs, True), block_table=(block_table, None))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    heads_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    result = q.new_zeros(heads_kv, q.shape[0], int(max_seqlen_k))
    starts = [cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_k, cu_seqlens_v)]
    for q0, q1, k0, k1, v0, v1 in zip(*(s for c in starts for s in (c[:-1], c[1:])), strict=True):
        fine = k[k0:k1].float().permute(1, 2, 0)  # [Hkv, D, W]
        coarse = v[v0:v1].float().permute(1, 2, 0)
        stride = _COMPRESSED_STRIDE * (1 if v1 - v0 == k1 - k0 else 4)
        for first in range(q0, q1, 256):
            rows = slice(first, min(first + 256, q1))
            heads = q[rows].float().unflatten(1, (heads_kv, group)).permute(1, 2, 0, 3)
            norm = scale * (heads @ coarse[:, None])  # [Hkv, G, rows, W2]
            scores = scale * (heads @ fine[:, None])
            if causal:
                seen = torch.arange(first - q0, rows.stop - q0, device=q.device)[:, None] + 1
                norm = _hide(norm, seen // stride - 1)
                scores = _hide(scores, seen // _COMPRESSED_STRIDE - 1)
            shares = (scores - torch.logsumexp(norm, -1, keepdim=True)).exp()
            shares = shares.nan_to_num(0, 0, 0).sum(1)
            result[:, rows, :k1 - k0] = shares.to(q.dtype)
    return result


def _hide(x: Tensor, visible: Tensor) -> Tensor:
    """-inf behind the first ``visible`` [rows, 1] of the last dimension."""
    return x.masked_fill(torch.arange(x.shape[-1], device=x.device) >= visible, -torch.inf)


def max_pooling_1d(input: Tensor, cache_len: int, local_blocks: int, init_blocks: int,
                   block_size: int = 64, stride: int = 16, *,
                   local_score: float = torch.inf) -> Tensor:
    """Windows' scores [Hkv, T, W] as blocks' [Hkv, T, N]: the best overlapping window; +inf for
    the first init_blocks, the own block and local_blocks before it, -inf ahead of the token.

    With local_score = -inf the own block and the local_blocks - 1 before it come last instead.
    """
    _check_scores(input)
    tokens = input.shape[1]
    positions = torch.arange(tokens, device=input.device) + int(cache_len)
    windows = torch.full_like(positions, input.shape[2])
    blocks = -(-(tokens + int(cache_len)) // block_size)
    return _pool(input, positions, windows, blocks, local_blocks, init_blocks, block_size, stride,
                 local_score)


def max_pooling_1d_varlen(
    input: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, cache_lens: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, local_blocks: int, init_blocks: int,
    block_size: int = 64, stride: int = 16, total_q: int = -1, *, local_score: float = torch.inf,
) -> Tensor:
    """``max_pooling_1d`` of packed sequences; cu_seqlens_k counts windows."""
    _check_scores(input)
    positions, sequence = _places(cu_seqlens_q, cache_lens, input.shape[1])
    blocks = -(-(int(max_seqlen_q) + int(cache_lens.max())) // block_size)
    return _pool(input, positions, cu_seqlens_k.diff()[sequence], blocks, local_blocks,
                 init_blocks, block_size, stride, local_score)


def _check_scores(input: Tensor) -> None:
    check_tensors(input=input)
    if input.dim() != 3:
        raise ValueError(f"input: {list(input.shape)}, expected [Hkv, T, W]")


def _pool(scores: Tensor, positions: Tensor, windows: Tensor, blocks: int, local_blocks: int,
          init_blocks: int, block_size: int, stride: int, local_score: float) -> Tensor:
    step = block_size // stride
    scores = _hide(scores, windows[:, None])
    room = blocks * step + 1  # one window before the first block
    padded = torch.nn.functional.pad(scores, (1, max(0, room - 1 - scores.shape[2])),
                                     value=-torch.inf)[..., :room]
    best = padded.unfold(-1, step + 1, step).amax(-1)
    block = torch.arange(blocks, device=scores.device)
    own = (positions // block_size)[:, None]
    local = block >= own - local_blocks + int(local_score < 0)
    best = best.masked_fill(local, local_score).masked_fill(block < init_blocks, torch.inf)
    return best.masked_fill(block > own, -torch.inf)


def infllmv2_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None, num_splits: int = 0, return_softmax_lse: bool = False,
    topk_idx: Tensor | None = None, block_window_size: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """New tokens q [B, Sq, Hq, D] over caches [B, S, Hkv, D], or pages [P, 64 n, Hkv, D] by
    block_table [B, pages]; k and v are written behind cache_seqlens first, in place.
    cache_batch_idx [B]: the row of the caches that each sequence has.

    The caches are copied into our pages at every call, and their lengths are read, which waits for
    the device: ``infllm.KVCache`` does neither.
    """
    _refuse(rotary_cos=(rotary_cos, None), rotary_sin=(rotary_sin, None),
            cache_leftpad=(cache_leftpad, None), window_size=(tuple(window_size), (-1, -1)),
            softcap=(softcap, 0.0), alibi_slopes=(alibi_slopes, None))
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    check_given(k=k, v=v, block_table=block_table, cache_batch_idx=cache_batch_idx)
    if q.dim() != 4 or k_cache.dim() != 4:
        raise ValueError(f"q and k_cache: {list(q.shape)} and {list(k_cache.shape)}, expected "
                         "[B, Sq, Hq, D] and [B, S, Hkv, D], or pages")
    batch, new, _, _ = q.shape
    _causal_enough(causal, new)
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] if block_table is None else None
    if cache_seqlens is None or (k is None) != (v is None):
        raise ValueError("cache_seqlens, k or v: missing, expected cache_seqlens with block_table, "
                         "and k and v together")
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: given with block_table, expected one of them")
    lengths = cache_seqlens.tolist() if isinstance(cache_seqlens, Tensor) else \
        [cache_seqlens] * batch
    if len(lengths) != batch:
        raise ValueError(f"cache_seqlens: {len(lengths)} lengths, expected {batch} as q has rows")
    added = 0 if k is None else new
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if max(lengths, default=0) + added > room:
        raise ValueError(f"cache_seqlens: {max(lengths)} keys and {added} new ones, but k_cache "
                         f"has room for {room} in a row")
    owners = range(batch) if cache_batch_idx is None else cache_batch_idx.tolist()
    packed: list[list[Tensor]] = [[], []]
    for b, (held, owner) in enumerate(zip(lengths, owners, strict=True)):
        for cache, fresh, taken in ((k_cache, k, packed[0]), (v_cache, v, packed[1])):
            size = cache.shape[1]
            rows = torch.arange(held + added, device=q.device)
            if block_table is None:
                rows = rows + owner * size
            else:
                rows = block_table[b].long()[rows // size] * size + rows % size
            flat = cache.flatten(0, 1)
            if fresh is not None:
                # Pages of one cache are contiguous, so this view writes through.
                flat = cache.view(-1, *cache.shape[2:])
                flat[rows[held:]] = fresh[b].to(cache.dtype)
            taken.append(flat[rows])
    totals = [len(x) for x in packed[0]]
    longest = max(totals, default=new)
    starts = torch.tensor([0, *totals], dtype=torch.int32, device=q.device)
    queries = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * new
    rest: dict[str, Any] = {}
    if topk_idx is not None:
        held = torch.tensor(totals, device=q.device) - new
        positions, _ = _places(queries, held, batch * new)
        _check_blocks(topk_idx, k_cache.shape[2], batch * new)
        rest = _over_blocks(topk_idx, positions, longest, block_window_size)
    keys, values = (torch.cat([*x, k_cache.flatten(0, 1)[:0]]) for x in packed)
    out, lse = attention(q.flatten(0, 1), keys, values, queries,
                         starts.cumsum(0, dtype=torch.int32), new, longest,
                         softmax_scale=softmax_scale, return_lse=True, **rest)
    out = out.view(q.shape)
    return (out, lse.unflatten(1, (batch, new)).transpose(0, 1)) if return_softmax_lse else out


def topk_to_uint64(topk_idx: Tensor, max_seqlen_k: int, block_size: int,
                   memory_buffer: Tensor | None = None) -> tuple[Tensor, int]:
    """Block indices [..., K] (-1: none) as bit rows [..., ceil(N / 64)], int64, and N."""
    blocks = -(-int(max_seqlen_k) // block_size)
    mask = torch.zeros(*topk_idx.shape[:-1], blocks + 1, dtype=torch.bool, device=topk_idx.device)
    inside = (topk_idx >= 0) & (topk_idx < blocks)
    mask.scatter_(-1, torch.where(inside, topk_idx, blocks).long(), True)
    return blockmask_to_uint64(mask[..., :blocks])[0], blocks


def blockmask_to_uint64(blockmask: Tensor) -> tuple[Tensor, int]:
    """A bool mask [..., N] as bit rows [..., ceil(N / 64)], int64, and N."""
    count = blockmask.shape[-1]
    padded = torch.nn.functional.pad(blockmask, (0, -count % 64)).unflatten(-1, (-1, 64))
    bits = torch.ones((), dtype=torch.int64, device=blockmask.device) << torch.arange(
        64, device=blockmask.device)
    return (padded * bits).sum(-1), count


def uint64_to_bool(uint64_array: Tensor, last_dim_size: int) -> Tensor:
    """The reverse of ``blockmask_to_uint64``."""
    shifts = torch.arange(64, device=uint64_array.device)
    return ((uint64_array[..., None] >> shifts) & 1).bool().flatten(-2)[..., :last_dim_size]
