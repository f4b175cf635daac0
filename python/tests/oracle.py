# SPDX-License-Identifier: Apache-2.0
"""InfLLM-V2 in plain PyTorch and float64, written from the equations, a token at a time: slow, and
differentiable where the operation is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import infllm


def float32_scale(head_dim: int) -> float:
    """D ** -0.5 as the operators get it."""
    return float(torch.tensor(head_dim ** -0.5, dtype=torch.float32))


def pooled_keys(k: Tensor, size: int, stride: int) -> Tensor:
    """k [S, D] as means of complete windows, [windows, D]."""
    count = max(0, (len(k) - size) // stride + 1)
    return torch.stack([k[j * stride:j * stride + size].mean(0) for j in range(count)]) if count \
        else k.new_zeros((0, k.shape[1]))


def block_scores(q: Tensor, k: Tensor, position: int, config: infllm.SparseConfig) -> list[float]:
    """One token's scores of its blocks up to its own: q [G, D] against k [S, D]."""
    scale = float32_scale(q.shape[1])
    size, stride = config.kernel_size, config.kernel_stride
    fine = pooled_keys(k[:position + 1], size, stride)
    coarse = pooled_keys(k[:position + 1], 4 * size, 4 * stride)
    norm_keys = fine if config.lse_source == "fine" else coarse
    scores = torch.zeros(len(fine), dtype=torch.float64)
    for head in q:
        scores += (scale * (fine @ head) - torch.logsumexp(scale * (norm_keys @ head), 0)).exp()
    if config.score_rounding == "bf16":
        scores = scores.float().bfloat16().double()
    result = []
    for block in range(position // config.block_size + 1):
        first = max(0, block * config.block_size // stride - (size // stride - 1))
        last = min(len(fine), (block + 1) * config.block_size // stride)
        result.append(float(scores[first:last].max()) if last > first else -math.inf)
    return result


def chosen_blocks(q: Tensor, k: Tensor, position: int, config: infllm.SparseConfig) -> list[int]:
    """The blocks that the token at ``position`` attends to, ascending."""
    own = position // config.block_size
    budget = config.budget_blocks
    if own + 1 <= budget:
        return list(range(own + 1))
    local = config.window_size // config.block_size + (0 if config.legacy_window else 1)
    forced = list(range(own, max(-1, own - local), -1))
    forced += [b for b in range(min(config.init_blocks, own + 1)) if b not in forced]
    scores = block_scores(q, k, position, config)
    others = sorted((b for b in range(own + 1) if b not in forced), key=lambda b: (-scores[b], b))
    return sorted((forced + others)[:budget])


def selection(q: Tensor, k: Tensor, config: infllm.SparseConfig, columns: int,
              q_score: Tensor | None = None, k_score: Tensor | None = None) -> Tensor:
    """Of one sequence: q [T, Hq, D], k [S, Hkv, D]; int32 [Hkv, T, columns]."""
    q = (q if q_score is None else q_score).double()
    k = (k if k_score is None else k_score).double()
    tokens, heads_kv, group = len(q), k.shape[1], q.shape[1] // k.shape[1]
    result = torch.full((heads_kv, tokens, columns), -1, dtype=torch.int32)
    for g in range(heads_kv):
        for t in range(tokens):
            chosen = chosen_blocks(q[t, g * group:(g + 1) * group], k[:, g],
                                   len(k) - tokens + t, config)
            result[g, t, :len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return result


def attend(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None, block_size: int = 64,
           ) -> tuple[Tensor, Tensor]:
    """Of one sequence: out [T, Hq, D] and the log-sum-exp [Hq, T] in float64, differentiable."""
    tokens, keys = len(q), len(k)
    group = q.shape[1] // k.shape[1]
    position = torch.arange(tokens)[:, None] + keys - tokens
    seen = (torch.arange(keys)[None] <= position).expand(k.shape[1], tokens, keys)
    if chosen is not None:
        block = torch.arange(keys) // block_size
        blocks = torch.zeros(k.shape[1], tokens, keys // block_size + 1, dtype=torch.bool)
        index = chosen.long().clamp(min=0)
        blocks.scatter_reduce_(2, index, chosen >= 0, "amax")
        seen = seen & blocks[:, :, block]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    x = torch.einsum("thd,shd->hts", q.double(), k) * float32_scale(q.shape[2])
    x = x.masked_fill(~seen.repeat_interleave(group, 0), -math.inf)
    lse = torch.logsumexp(x, -1)
    weights = (x - lse[..., None]).exp().nan_to_num(0)
    return torch.einsum("hts,shd->thd", weights, v), lse


def batch(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int],
          chosen: Tensor | None, sparse: list[bool], block_size: int = 64,
          ) -> tuple[Tensor, Tensor]:
    """``attend`` over packed sequences; dense ones ignore ``chosen``."""
    outs, lses = [], []
    start_q = start_k = 0
    for tokens, keys, is_sparse in zip(lengths_q, lengths_k, sparse, strict=True):
        rows, columns = slice(start_q, start_q + tokens), slice(start_k, start_k + keys)
        blocks = chosen[:, rows] if chosen is not None and is_sparse else None
        out, lse = attend(q[rows], k[columns], v[columns], blocks, block_size)
        outs.append(out)
        lses.append(lse)
        start_q, start_k = start_q + tokens, start_k + keys
    return torch.cat(outs), torch.cat(lses, 1)
