# SPDX-License-Identifier: Apache-2.0
"""Attention inputs of the kinds of device_bench (bench/support/attention_data.h), made with PyTorch.

A key is a topic shared by 16 neighbouring tokens plus noise. Query t is r times query t-1 plus
fresh noise; correlation_for() finds the r for which neighbours share the wanted part of the blocks
that they choose freely. r = 0 is "random".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOPIC_TOKENS = 16
TOPIC_SHARE = 0.6  # of a key's variance
QUERY_SCALE = 2.0  # logits with a spread of about 2, as trained heads have
OVERLAP_TOKENS = 64  # the last ones of a prompt, over which overlap is measured


def wanted_overlap(kind: str) -> float | None:
    """0.8 of "correlated-0.8"; None of "random"."""
    if kind == "random":
        return None
    name, _, share = kind.partition("-")
    if name != "correlated" or not share:
        raise ValueError(f'found the input "{kind}", expected random or correlated-0.8 or the like')
    return float(share)


def topical_keys(tokens: int, heads: int, dim: int, device: str) -> Tensor:
    """[T, Hkv, D] bf16."""
    topics = torch.randn(-(-tokens // TOPIC_TOKENS), heads, dim, device=device)
    own = torch.randn(tokens, heads, dim, device=device) * (1 - TOPIC_SHARE)**0.5
    shared = topics.repeat_interleave(TOPIC_TOKENS, 0)[:tokens] * TOPIC_SHARE**0.5
    return (own + shared).to(torch.bfloat16)


def queries(noise: Tensor, correlation: float) -> Tensor:
    """Queries [T, Hq, D] in bf16 from normal numbers of the same shape, the fresh parts.

    sum over s of r^s fresh[t - s], by doubling the number of terms until the next is nothing."""
    q = noise.float() * (QUERY_SCALE * (1 - correlation**2)**0.5)
    terms = 1
    while terms < len(q) and correlation**terms > 1e-4:
        q[terms:] += correlation**terms * q[:-terms]
        terms *= 2
    return q.to(torch.bfloat16)


def overlap(chosen: Tensor, first: int, local: int, block: int) -> float:
    """Share of the last tokens' freely chosen blocks that the token before has too.

    chosen: [Hkv, T, columns], ascending with -1 behind, of tokens 0..T-1. Not free are the `first`
    blocks of a prompt, and of a token its own and the `local` before it."""
    tokens = chosen.shape[1]
    count = min(OVERLAP_TOKENS, tokens)
    last = chosen[:, -count:]
    position = torch.arange(tokens - count, tokens, device=chosen.device)
    limit = (position // block - local)[None, :, None]
    blocks = -(-tokens // block)
    free = torch.zeros(*last.shape[:2], blocks + 1, dtype=torch.bool, device=chosen.device)
    free.scatter_(2, torch.where((last >= first) & (last < limit), last, blocks).long(), True)
    free = free[..., :blocks]
    total = int(free[:, 1:].sum())
    return int((free[:, 1:] & free[:, :-1]).sum()) / total if total else 1.0


def correlation_for(wanted: float, overlap_at: Callable[[float], float]) -> float:
    """The correlation at which neighbours share `wanted`, which grows with it."""
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap_at(middle) < wanted else (low, middle)
    return (low + high) / 2
