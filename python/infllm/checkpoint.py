# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing that keeps the chosen blocks.

    def block(x):
        q, k, v = project(x)
        chosen = infllm.choose(q, k, sparse_config=config)
        return infllm.attention(q, k, v, sparse_config=config, selection=chosen)

    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False,
                                          context_fn=infllm.save_selections)

The second forward pass then takes the blocks of the first, 4 bytes for each of [Hkv, T, K], instead
of scoring again: less time, and the same blocks even where what comes before attention does not
repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts


def save_selections() -> tuple[Any, Any]:
    """A ``context_fn`` for ``torch.utils.checkpoint``: results of ``infllm.choose`` are kept."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if op is torch.ops.infllm.choose.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
