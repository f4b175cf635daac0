# SPDX-License-Identifier: Apache-2.0
"""InfLLM-V2 block selection in plain PyTorch, and the loss that teaches keys to be found.

For a query token at position p (own block qb = p // B) and a KV head with G query heads:

    KC1[j] = mean K[16 j : 16 j + 32]          fine windows       (kernel_size, kernel_stride)
    KC2[m] = mean K[64 m : 64 m + 128]         coarse windows     (4x both), for the normaliser only
    S[j]   = sum over the group's heads of exp(scale q . KC1[j] - LSE over KC2[visible])
    R[b]   = max S[j] over the five windows that overlap block b
    block 0 (sink) and blocks qb - W .. qb (window) are always chosen; the best others fill up to T

T = topk + W, W = window_size // block_size. Ties go to the lower block index.
Shapes: q [N, Hq, T, d], k [N, Hk, S, d], positions [T] (place in the sequence, not the RoPE angle).
"""

import dataclasses
import math

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 512
    topk: int = 22
    use_nope: bool = False
    dense_len: int = 2048

    @property
    def window_blocks(self):
        return self.window_size // self.block_size

    @property
    def budget(self):
        return self.topk + self.window_blocks


def pool_keys(k, size, stride):
    """Means of the complete windows of k [N, Hk, S, d] -> [N, Hk, n, d], float32."""
    n, heads, length, d = k.shape
    if length < size:
        return k.new_zeros(n, heads, 0, d, dtype=torch.float32)
    windows = F.avg_pool1d(k.float().transpose(2, 3).reshape(n * heads, d, length), size, stride)
    return windows.reshape(n, heads, d, -1).transpose(2, 3)


def log_window_scores(q, k, positions, config):
    """log of the terms of S per head: scale q . KC1[j] - coarse LSE -> [N, Hq, T, n1], float32.

    The causal limit of the fine windows is left out: it only touches blocks that are forced.
    """
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1])
    fine = pool_keys(k, config.kernel_size, config.kernel_stride)
    coarse = pool_keys(k, 4 * config.kernel_size, 4 * config.kernel_stride)
    q = q.float() * scale
    logits = q @ fine.repeat_interleave(group, 1).transpose(2, 3)
    if coarse.shape[2]:
        a = q @ coarse.repeat_interleave(group, 1).transpose(2, 3)
        visible = (positions + 1) // (4 * config.kernel_stride) - 1
        seen = torch.arange(a.shape[-1], device=a.device) < visible[:, None]
        lse = a.masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True)
        logits = logits - torch.where(torch.isfinite(lse), lse, torch.zeros_like(lse))
    return logits


def pool_to_blocks(scores, blocks, config):
    """Max over the windows that overlap each block: [..., n1] -> [..., blocks], -inf where none."""
    stride = config.block_size // config.kernel_stride
    flat = scores.reshape(1, -1, scores.shape[-1])
    missing = blocks * stride - flat.shape[-1] + 1
    flat = F.pad(flat, (1, max(0, missing)), value=-torch.inf)
    pooled = F.max_pool1d(flat, stride + 1, stride)[..., :blocks]
    return pooled.reshape(*scores.shape[:-1], blocks)


def forced_blocks(positions, blocks, config):
    """forced, past: bool [T, blocks]; past = no later than the query's own block."""
    own = (positions // config.block_size)[:, None]
    index = torch.arange(blocks, device=positions.device)
    past = index <= own
    forced = past & ((index < config.init_blocks) | (index >= own - config.window_blocks))
    return forced, past


@torch.no_grad()
def select(q, k, positions, config, budget=None, stable=False):
    """bool [N, Hk, T, blocks]: the blocks each token and KV head attends to.

    stable=False breaks ties as torch.topk likes (training); True gives them to the lower index.
    """
    budget = budget or config.budget
    n, hq, rows, _ = q.shape
    hk, blocks = k.shape[1], -(-k.shape[2] // config.block_size)
    forced, past = forced_blocks(positions, blocks, config)
    if blocks <= budget:
        return past.expand(n, hk, rows, blocks)
    scores = log_window_scores(q, k, positions, config).exp_()
    scores = scores.reshape(n, hk, hq // hk, rows, -1).sum(2)
    ranked = pool_to_blocks(scores, blocks, config)
    ranked.masked_fill_(forced, torch.inf).masked_fill_(~past, -torch.inf)
    if stable:
        best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    else:
        best = ranked.topk(budget, -1, sorted=False).indices
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, True) & past


def alignment_loss(q, k, positions, config):
    """How far block scores are from where dense attention looks; gradient reaches q and k.

    - mean over tokens, KV heads of sum_b p[b] log r[b]   over the freely choosable blocks b
    p[b] = dense attention mass of block b, mean over the group's heads, no gradient
    r    = softmax over those blocks of log R[b]
    """
    n, hq, rows, d = q.shape
    hk, length = k.shape[1], k.shape[2]
    group, blocks = hq // hk, -(-length // config.block_size)
    forced, past = forced_blocks(positions, blocks, config)
    free = past & ~forced
    with torch.no_grad():
        logits = (q @ k.repeat_interleave(group, 1).transpose(2, 3)).float() / math.sqrt(d)
        future = torch.arange(length, device=q.device) > positions[:, None]
        mass = logits.masked_fill_(future, -torch.inf).softmax(-1)
        mass = F.pad(mass, (0, blocks * config.block_size - length))
        mass = mass.reshape(n, hk, group, rows, blocks, -1).sum(-1).mean(2) * free
    scores = log_window_scores(q, k, positions, config)
    scores = scores.reshape(n, hk, group, rows, -1).logsumexp(2)
    ranked = pool_to_blocks(scores, blocks, config).masked_fill(~free, -1e9)
    return -(mass * ranked.log_softmax(-1)).sum(-1).mean()
