# SPDX-License-Identifier: Apache-2.0
"""InfLLM-V2's numbers, in Hugging Face's spelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from infllm import _native

LSE_SOURCES = ("coarse", "fine")
SCORE_ROUNDINGS = ("bf16", "none")


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """What ``config.json`` calls ``sparse_config``; the defaults are the released numbers.

    A token attends to ``topk + window_size // block_size`` blocks of ``block_size`` keys: the first
    ``init_blocks``, the local window and its own block, and the best others. A sequence with fewer
    than ``dense_len`` keys attends to everything (-1: never).
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    dense_len: int = 8192
    use_nope: bool = False
    # Variants of the published code, not in config.json.
    lse_source: str = "coarse"
    score_rounding: str = "bf16"
    legacy_window: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value).__name__ != field.type:
                article = "an" if field.type == "int" else "a"
                raise TypeError(f"sparse_config: {field.name} = {value!r}, expected {article} "
                                f"{field.type}")
            if field.type == "int" and not -2**31 <= value < 2**31:
                raise ValueError(f"sparse_config: {field.name} = {value}, expected 32 bits")
        for name, known in (("lse_source", LSE_SOURCES), ("score_rounding", SCORE_ROUNDINGS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"sparse_config: {name} = {getattr(self, name)!r}, expected one of {known}")
        if not torch.compiler.is_compiling():
            _native.SparseConfig(self.numbers())  # refuses numbers that do not fit together

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseConfig:
        """From ``config.json``'s dictionary. Unknown names are refused, null means the default."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"sparse_config: unknown {unknown}, expected some of {sorted(known)}")
        return cls(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> SparseConfig:
        """The reverse of ``numbers``."""
        *counts, use_nope, lse_source, score_rounding, legacy_window = numbers
        values: list[Any] = [*counts, bool(use_nope), LSE_SOURCES[lse_source],
                             SCORE_ROUNDINGS[score_rounding], bool(legacy_window)]
        return cls(*values)

    @property
    def budget_blocks(self) -> int:
        """Blocks that a token attends to: sink, local and freely chosen ones together."""
        return self.topk + self.window_size // self.block_size

    def blocks_in(self, length: int) -> int:
        """Blocks that ``length`` keys fill, the last one perhaps in part."""
        return -(-length // self.block_size)

    def columns(self, max_seqlen_k: int) -> int:
        """Columns of a selection over sequences of at most ``max_seqlen_k`` keys."""
        blocks = self.blocks_in(max_seqlen_k)
        # Not min(): torch.compile and torch.export then know the number.
        return blocks if blocks < self.budget_blocks else self.budget_blocks

    def is_sparse_at(self, length: int) -> bool:
        """Whether a sequence of ``length`` keys attends to selected blocks only."""
        return length >= self.dense_len

    def numbers(self) -> list[int]:
        """The fields as the operators take them."""
        return [self.kernel_size, self.kernel_stride, self.init_blocks, self.block_size,
                self.window_size, self.topk, self.dense_len, int(self.use_nope),
                LSE_SOURCES.index(self.lse_source), SCORE_ROUNDINGS.index(self.score_rounding),
                int(self.legacy_window)]
