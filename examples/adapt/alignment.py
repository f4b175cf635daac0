# SPDX-License-Identifier: Apache-2.0
"""The selection-alignment loss in plain PyTorch, for sequences of one length.

For a row at position p and a KV head, over the blocks b that selection chooses freely (neither sink
nor window, whatever the budget):

    A[b] = dense attention mass of block b, mean over the group's heads, without gradient
    R[b] = max over the windows that touch b of logsumexp over the group's heads of
           scale q_h . KC1[j] - LSE over the visible KC2
    loss = - sum_b A[b] log softmax(R)[b], mean over rows and KV heads

The gradient reaches q and k. docs/algorithm.md says what the pooled keys KC1 and KC2 are.
"""

import infllm
import torch
import torch.nn.functional as F
from torch import Tensor


def pooled(k: Tensor, size: int, stride: int) -> Tensor:
    """Means of the complete windows of k [B, L, H, D] -> [B, H, n, D], in k's type."""
    b, length, heads, d = k.shape
    if length < size:
        return k.new_zeros(b, heads, 0, d)
    x = k.float().permute(0, 2, 3, 1).reshape(b * heads, d, length)
    means = F.avg_pool1d(x, size, stride)
    return means.view(b, heads, d, -1).transpose(2, 3).to(k.dtype)


def block_maxima(scores: Tensor, blocks: int, config: infllm.SparseConfig) -> Tensor:
    """[..., n] -> [..., blocks]: the largest over the windows that touch a block."""
    stride = config.block_size // config.kernel_stride
    flat = scores.reshape(1, -1, scores.shape[-1])
    missing = max(0, blocks * stride - flat.shape[-1] + 1)
    flat = F.pad(flat, (1, missing), value=-torch.inf)
    return F.max_pool1d(flat, stride + 1, stride)[..., :blocks].view(*scores.shape[:-1], blocks)


def selection_alignment_loss(
    q: Tensor, k: Tensor, rows: Tensor, length: int, config: infllm.SparseConfig
) -> Tensor:
    """q [T, Hq, D], k [T, Hkv, D]: T / length sequences; rows: int32 [R] tokens, as many of each."""
    count, hq, d = q.shape[0] // length, q.shape[1], q.shape[2]
    hk, group, blocks = k.shape[1], hq // k.shape[1], -(-length // config.block_size)
    rows = rows.view(count, -1).long()
    position = rows % length  # [B, R]
    taught = rows.shape[1]
    # [B, Hkv, G R, D]: a KV head's queries behind one another
    x = q[rows.flatten()].view(count, taught, hk, group, d).permute(0, 2, 3, 1, 4)
    x = x.reshape(count, hk, group * taught, d)
    keys = k.view(count, length, hk, d)
    scale = d**-0.5

    index = torch.arange(blocks, device=q.device)
    own = position // config.block_size
    local = own - config.window_size // config.block_size
    free = (index >= config.init_blocks) & (index < local[..., None])  # [B, R, blocks]
    free = free[:, None]
    with torch.no_grad():
        logits = (x @ keys.permute(0, 2, 3, 1)).float().mul_(scale)
        logits = logits.view(count, hk, group, taught, length)
        future = torch.arange(length, device=q.device) > position[..., None]
        mass = logits.masked_fill_(future[:, None, None], -torch.inf).softmax(-1).mean(2)
        mass = F.pad(mass, (0, blocks * config.block_size - length))
        mass = mass.view(count, hk, taught, blocks, -1).sum(-1) * free

    fine = pooled(keys, config.kernel_size, config.kernel_stride)
    coarse = pooled(keys, 4 * config.kernel_size, 4 * config.kernel_stride)
    scores = (x @ fine.transpose(2, 3)).float() * scale
    if coarse.shape[2]:
        a = (x @ coarse.transpose(2, 3)).float() * scale
        visible = (position + 1) // (4 * config.kernel_stride) - 1
        seen = torch.arange(a.shape[-1], device=q.device) < visible[..., None]
        seen = seen[:, None].repeat(1, 1, group, 1)  # [B, 1, G R, m]
        norm = a.masked_fill(~seen, -1e30).logsumexp(-1, keepdim=True)
        scores = scores - norm.where(seen.any(-1, keepdim=True), torch.zeros_like(norm))
    scores = scores.view(count, hk, group, taught, -1).logsumexp(2)
    ranked = block_maxima(scores, blocks, config).masked_fill(~free, -1e9)
    return -(mass * ranked.log_softmax(-1)).sum(-1).mean()
