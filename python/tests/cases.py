# SPDX-License-Identifier: Apache-2.0
"""Batches at the edges of windows, blocks and budgets, and their numbers."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import infllm

# Small enough that the oracle's loops take no time: 4 blocks of 64, one of them free to choose.
SMALL = infllm.SparseConfig(init_blocks=1, window_size=64, topk=3, dense_len=256)


@dataclasses.dataclass(frozen=True)
class Case:
    """Packed sequences: ``lengths_q[b]`` new tokens at the end of ``lengths_k[b]`` keys."""

    name: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 64
    config: infllm.SparseConfig | None = SMALL

    @property
    def sparse(self) -> list[bool]:
        return [self.config is not None and self.config.is_sparse_at(n) for n in self.lengths_k]

    def numbers(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0, grad: bool = False,
                ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as leaves."""
        generator = torch.Generator().manual_seed(seed)
        shapes = ((sum(self.lengths_q), self.heads_q), (sum(self.lengths_k), self.heads_kv),
                  (sum(self.lengths_k), self.heads_kv))
        return tuple(torch.randn(*shape, self.head_dim, generator=generator).to(device, dtype)
                     .requires_grad_(grad) for shape in shapes)

    def where(self, device: str = "cpu") -> dict[str, object]:
        """cu_seqlens and the longest lengths, as keyword arguments."""
        return {"cu_seqlens_q": starts(self.lengths_q).to(device),
                "cu_seqlens_k": starts(self.lengths_k).to(device),
                "max_seqlen_q": max(self.lengths_q), "max_seqlen_k": max(self.lengths_k)}


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


DENSE = [
    Case("two tokens", (2,), (2,), config=None),
    Case("block and one", (65,), (65,), config=None),
    Case("ragged", (63, 1, 0, 64, 100), (63, 1, 0, 64, 100), config=None),
    Case("histories", (3, 1, 40), (70, 64, 41), config=None),
    Case("one head for all", (33,), (97,), heads_q=7, heads_kv=1, config=None),
    Case("no groups", (66,), (66,), heads_q=3, heads_kv=3, head_dim=128, config=None),
]
SPARSE = [
    Case("at dense_len", (256,), (256,)),
    Case("below dense_len", (255,), (255,)),
    Case("partial block", (330,), (330,)),
    Case("ragged, some dense", (300, 10, 0, 257), (300, 10, 0, 257)),
    Case("histories", (5, 1, 70), (321, 400, 333)),
    Case("group of 16", (40,), (450,), heads_q=32, heads_kv=2),
    Case("group of 7, d 128", (30,), (391,), heads_q=7, heads_kv=1, head_dim=128),
    Case("always sparse", (129,), (129,), config=dataclasses.replace(SMALL, dense_len=-1)),
    Case("two sinks, no window", (300,), (300,),
         config=dataclasses.replace(SMALL, init_blocks=2, window_size=0)),
    Case("fine normaliser", (50,), (350,), config=dataclasses.replace(SMALL, lse_source="fine")),
    Case("legacy window", (50,), (350,), config=dataclasses.replace(SMALL, legacy_window=True)),
]
ALL = DENSE + SPARSE


def identifier(case: Case) -> str:
    return f"{'dense' if case.config is None else 'sparse'}-{case.name.replace(' ', '_')}"
