#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""One training step through infllm.attention: what docs/python.md shows, as a program.

    python3 examples/train_step.py            prints the loss of ten steps
"""

import torch

import infllm


def main(steps: int = 10) -> list[float]:
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    # Two sequences of 700 and 324 tokens; the longer one attends sparsely.
    config = infllm.SparseConfig(window_size=128, topk=4, dense_len=512)
    cu_seqlens = torch.tensor([0, 700, 1024], dtype=torch.int32, device=device)
    plan = infllm.make_plan(cu_seqlens, None, 700, 700, sparse_config=config)
    project = torch.nn.Linear(256, (4 + 2 + 2) * 64, device=device, dtype=dtype)
    combine = torch.nn.Linear(4 * 64, 256, device=device, dtype=dtype)
    optimizer = torch.optim.AdamW([*project.parameters(), *combine.parameters()], lr=1e-3)
    x, target = torch.randn(2, 1024, 256, device=device, dtype=dtype)
    losses = []
    for _ in range(steps):
        q, k, v = project(x).unflatten(-1, (8, 64)).split([4, 2, 2], dim=1)
        out = infllm.attention(q, k, v, plan=plan)
        loss = (combine(out.flatten(1)) - target).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(*(f"{loss:.4f}" for loss in main()))
