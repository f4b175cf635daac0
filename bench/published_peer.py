# SPDX-License-Identifier: Apache-2.0
"""The published InfLLM-V2 kernels (OpenBMB/infllmv2_cuda_impl) as the peers of bench/peers_cuda.py.

Where the user has installed their package, `infllm_v2`, the two steps below call it as MiniCPM4's
model code does, on a whole prompt of one sequence:

    select   pooled keys by strided means, infllmv2_attn_stage1, max_pooling_1d, topk
    attend   infllmv2_attn_varlen_func over the selected blocks

The functions' parameters were read from their main branch; missing() says what an installed version
lacks, instead of timing something else.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType

import torch

BLOCK, STRIDE = 64, 16
LOCAL_BLOCKS, INIT_BLOCKS = 33, 1  # a window of 2048 tokens and the own block; the sink
GROUP = 16  # query heads that stage 1 adds up, a constant of theirs
NEEDED = {
    "infllmv2_attn_stage1": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_v",
                             "max_seqlen_q", "max_seqlen_k", "causal"),
    "max_pooling_1d": ("input", "cache_len", "local_blocks", "init_blocks", "block_size", "stride"),
    "infllmv2_attn_varlen_func": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q",
                                  "max_seqlen_k", "causal", "topk_idx"),
}


def load() -> ModuleType:
    """The installed package; raises ImportError that says what is missing."""
    module = importlib.import_module("infllm_v2")
    lacks = missing(module)
    if lacks:
        raise ImportError(f"infllm_v2 {getattr(module, '__version__', '')} lacks {', '.join(lacks)}")
    return module


def missing(module: ModuleType) -> list[str]:
    """Functions and parameters that the steps need and the module does not have."""
    lacks = []
    for name, parameters in NEEDED.items():
        function = getattr(module, name, None)
        if function is None:
            lacks.append(f"{name}()")
            continue
        known = inspect.signature(function).parameters
        lacks += [f"{name}({p}=)" for p in parameters if p not in known]
    return lacks


def pooled(k: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """Means of windows of `size` keys: [T, Hkv, D] -> [windows, Hkv, D]."""
    return k.unfold(0, size, stride).mean(-1).contiguous()


def steps(module: ModuleType, shape: dict, device: str = "cuda"
          ) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """select() -> [Hkv, T, blocks] int32, ascending with -1 wherever the token sees fewer, and
    attend() -> [T, Hq, D], which attends to what one select() chose. Normal random numbers."""
    tokens, blocks = shape["tokens"], shape["blocks"]
    if shape["batch"] != 1 or shape["heads_q"] != GROUP * shape["heads_kv"]:
        raise ValueError(f"infllm_v2 takes {GROUP} query heads a KV head here, and one sequence")

    def rows(heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, shape["head_dim"], device=device, dtype=torch.bfloat16)

    def starts(count: int) -> torch.Tensor:
        return torch.tensor([0, count], device=device, dtype=torch.int32)

    q, k, v = rows(shape["heads_q"]), rows(shape["heads_kv"]), rows(shape["heads_kv"])
    own = torch.arange(tokens, device=device).div(BLOCK, rounding_mode="floor")[None, :, None]

    def select() -> torch.Tensor:
        fine, coarse = pooled(k, 2 * STRIDE, STRIDE), pooled(k, 8 * STRIDE, 4 * STRIDE)
        scores = module.infllmv2_attn_stage1(
            q, fine, coarse, cu_seqlens_q=starts(tokens), cu_seqlens_k=starts(len(fine)),
            cu_seqlens_v=starts(len(coarse)), max_seqlen_q=tokens, max_seqlen_k=len(fine),
            causal=True)
        best = module.max_pooling_1d(scores, cache_len=0, local_blocks=LOCAL_BLOCKS,
                                     init_blocks=INIT_BLOCKS, block_size=BLOCK, stride=STRIDE)
        chosen = best.topk(min(blocks, best.shape[-1]), dim=-1).indices.sort(-1).values
        chosen[chosen > own] = -1
        return chosen.to(torch.int32)

    chosen = select()

    def attend() -> torch.Tensor:
        return module.infllmv2_attn_varlen_func(
            q, k, v, starts(tokens), starts(tokens), tokens, tokens, causal=True, topk_idx=chosen)

    return select, attend
