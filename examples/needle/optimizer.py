# SPDX-License-Identifier: Apache-2.0
"""AdamW for everything, or Muon for the matrices and AdamW for embedding and norms."""

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Muon's public description


def orthogonalise(g, steps=5):
    """Pushes the singular values of a stack of matrices g [n, a, b] towards 1; products alone."""
    a, b, c = NEWTON_SCHULZ
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, inner, x, beta=a)
    return (x.transpose(1, 2) if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov step, orthogonalised; matrices of one shape go through as one stack."""

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(tuple(p.shape), []).append(p)
            for (rows, columns), matrices in shapes.items():
                for p in matrices:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                grads = [p.grad for p in matrices]
                buffers = [self.state[p]["momentum"] for p in matrices]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                steps = torch._foreach_lerp(grads, buffers, group["momentum"])
                update = orthogonalise(torch.stack(steps))
                rate = -group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_add_(matrices, list(update.unbind(0)), alpha=rate)


def build(net, kind, recipe):
    """The optimizers; each group keeps its full rate as base_lr, the schedule scales it."""
    named = list(net.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and "embed_tokens" not in n]
    others = [p for n, p in named if p.dim() != 2 or "embed_tokens" in n]
    result = []
    if kind == "muon":
        result.append(Muon(matrices, lr=recipe.muon_rate))
    else:
        others = matrices + others
    result.append(
        torch.optim.AdamW(
            others,
            lr=recipe.adamw_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=others[0].is_cuda,
        )
    )
    for optimizer in result:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return result
