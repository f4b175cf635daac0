# SPDX-License-Identifier: Apache-2.0
"""The published InfLLM-V2 kernels (OpenBMB/infllmv2_cuda_impl) as the peers of bench/peers_cuda.py.

Where the user has installed their package, `infllm_v2`, these classes call it as MiniCPM4's model
code does, for one layer:

    Prefill   a whole prompt: pooled keys by strided means, which their package leaves to PyTorch;
              infllmv2_attn_stage1, max_pooling_1d, topk; infllmv2_attn_varlen_func, and its gradients
    Decode    one token of each of several sequences: infllmv2_attn_stage1, max_pooling_1d, topk;
              infllmv2_attn_with_kvcache

Nothing here waits for the device or copies from the host between the calls, so that what a replayed
graph would save is not counted against them. missing() says what an installed version lacks, instead of
timing something else.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import os
from types import ModuleType

import peer_inputs
import torch
from torch import Tensor

BLOCK, STRIDE = 64, 16
LOCAL_BLOCKS, INIT_BLOCKS = 32, 1  # a window of 2048 tokens, to which theirs adds the own block; the sink
GROUP = 16  # query heads that stage 1 adds up, a constant of theirs
NEEDED = {
    "infllmv2_attn_stage1": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_v",
                             "max_seqlen_q", "max_seqlen_k", "causal"),
    "max_pooling_1d": ("input", "cache_len", "local_blocks", "init_blocks", "block_size", "stride"),
    "infllmv2_attn_varlen_func": ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q",
                                  "max_seqlen_k", "causal", "topk_idx"),
    "infllmv2_attn_with_kvcache": ("q", "k_cache", "v_cache", "cache_seqlens", "topk_idx"),
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


def version(module: ModuleType) -> str:
    """'0.1.0, f908e73': theirs, and the commit where pip or INFLLM_V2_COMMIT knows it."""
    commit = os.environ.get("INFLLM_V2_COMMIT", "")
    if not commit:
        try:
            origin = importlib.metadata.distribution("infllm_v2").read_text("direct_url.json")
            commit = json.loads(origin or "{}").get("vcs_info", {}).get("commit_id", "")
        except importlib.metadata.PackageNotFoundError:
            pass
    return ", ".join(part for part in (getattr(module, "__version__", ""), commit[:7]) if part)


def pooled(k: Tensor, size: int, stride: int) -> Tensor:
    """Means of windows of `size` keys: [T, Hkv, D] -> [windows, Hkv, D]."""
    return k.unfold(0, size, stride).mean(-1).contiguous()


def starts(sequences: int, length: int, device: str) -> Tensor:
    """[0, length, 2 length, ...], `sequences` + 1 of them."""
    return torch.arange(sequences + 1, device=device, dtype=torch.int32) * length


def best_blocks(scores: Tensor, blocks: int) -> Tensor:
    """The `blocks` best of scores [..., all], ascending, int32."""
    return scores.topk(min(blocks, scores.shape[-1]), dim=-1).indices.sort(-1).values.to(torch.int32)


def check_group(shape: dict) -> None:
    if shape["heads_q"] != GROUP * shape["heads_kv"]:
        raise ValueError(f"infllm_v2 takes {GROUP} query heads a KV head here, "
                         f"found {shape['heads_q']} and {shape['heads_kv']}")


class Prefill:
    """A prompt of one sequence; `kind` as device_bench names its inputs. After construction, q, k and v
    are [T, H, D], and every step has run once."""

    def __init__(self, module: ModuleType, shape: dict, kind: str = "random", device: str = "cuda"):
        check_group(shape)
        if shape["batch"] != 1:
            raise ValueError(f"found {shape['batch']} sequences, expected one prompt")
        self.module, self.tokens, self.blocks = module, shape["tokens"], shape["blocks"]
        heads_kv, dim = shape["heads_kv"], shape["head_dim"]
        noise = torch.randn(self.tokens, shape["heads_q"], dim, device=device, dtype=torch.bfloat16)
        self.k = peer_inputs.topical_keys(self.tokens, heads_kv, dim, device)
        self.v = torch.randn_like(self.k)
        self.starts = starts(1, self.tokens, device)
        self.own = torch.arange(self.tokens, device=device).div(BLOCK, rounding_mode="floor")[None, :, None]
        self.compress()
        self.starts_fine = starts(1, len(self.fine), device)
        self.starts_coarse = starts(1, len(self.coarse), device)
        self.overlap = 0.0

        def overlap_at(correlation: float) -> float:
            self.q = peer_inputs.queries(noise, correlation)
            self.select()
            self.overlap = peer_inputs.overlap(self.chosen, INIT_BLOCKS, LOCAL_BLOCKS, BLOCK)
            return self.overlap

        wanted = peer_inputs.wanted_overlap(kind)
        overlap_at(0.0 if wanted is None else peer_inputs.correlation_for(wanted, overlap_at))

    def compress(self) -> None:
        self.fine = pooled(self.k, 2 * STRIDE, STRIDE)
        self.coarse = pooled(self.k, 8 * STRIDE, 4 * STRIDE)

    def select(self) -> Tensor:
        """[Hkv, T, blocks] int32, ascending with -1 wherever the token sees fewer."""
        scores = self.module.infllmv2_attn_stage1(
            self.q, self.fine, self.coarse, cu_seqlens_q=self.starts, cu_seqlens_k=self.starts_fine,
            cu_seqlens_v=self.starts_coarse, max_seqlen_q=self.tokens, max_seqlen_k=len(self.fine),
            causal=True)
        best = self.module.max_pooling_1d(scores, cache_len=0, local_blocks=LOCAL_BLOCKS,
                                          init_blocks=INIT_BLOCKS, block_size=BLOCK, stride=STRIDE)
        chosen = best_blocks(best, self.blocks)
        self.chosen = chosen.masked_fill_(chosen > self.own, -1)
        return self.chosen

    def attend(self, inputs: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """[T, Hq, D]: attention to what select() chose."""
        return self.module.infllmv2_attn_varlen_func(
            *(inputs or (self.q, self.k, self.v)), self.starts, self.starts, self.tokens, self.tokens,
            causal=True, topk_idx=self.chosen)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        self.compress()
        self.select()
        return self.attend(inputs)

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v that want gradients."""
        return tuple(x.detach().requires_grad_() for x in (self.q, self.k, self.v))


class Decode:
    """One token of each of shape["batch"] sequences of shape["tokens"], this one included, in `layers`
    layers, whose keys are pooled already."""

    def __init__(self, module: ModuleType, shape: dict, layers: int = 1, device: str = "cuda"):
        check_group(shape)
        self.module, self.shape = module, shape
        batch, tokens, heads_kv, dim = (shape[n] for n in ("batch", "tokens", "heads_kv", "head_dim"))
        kind = {"device": device, "dtype": torch.bfloat16}
        self.q = torch.randn(batch, shape["heads_q"], dim, **kind) * peer_inputs.QUERY_SCALE
        self.layers = []
        for _ in range(layers):
            k = torch.empty(batch, tokens, heads_kv, dim, **kind)
            for b in range(batch):
                k[b] = peer_inputs.topical_keys(tokens, heads_kv, dim, device)
            fine, coarse = (torch.cat([pooled(x, size, stride) for x in k])
                            for size, stride in ((2 * STRIDE, STRIDE), (8 * STRIDE, 4 * STRIDE)))
            self.layers.append((k, torch.randn_like(k), fine, coarse))
        self.windows = len(self.layers[0][2]) // batch
        self.starts = starts(batch, 1, device)
        self.starts_fine = starts(batch, self.windows, device)
        self.starts_coarse = starts(batch, len(self.layers[0][3]) // batch, device)
        self.lengths = torch.full((batch,), tokens, device=device, dtype=torch.int32)

    def select(self, layer: int = 0) -> Tensor:
        """[B, Hkv, 1, blocks] int32, ascending."""
        _, _, fine, coarse = self.layers[layer]
        scores = self.module.infllmv2_attn_stage1(
            self.q, fine, coarse, cu_seqlens_q=self.starts, cu_seqlens_k=self.starts_fine,
            cu_seqlens_v=self.starts_coarse, max_seqlen_q=1, max_seqlen_k=self.windows, causal=False)
        # A row of a head and a sequence is a head of one token to it: max_pooling_1d_varlen waits for
        # the device.
        heads_kv, batch = scores.shape[:2]
        best = self.module.max_pooling_1d(
            scores.reshape(heads_kv * batch, 1, -1), cache_len=self.shape["tokens"] - 1,
            local_blocks=LOCAL_BLOCKS, init_blocks=INIT_BLOCKS, block_size=BLOCK, stride=STRIDE)
        chosen = best_blocks(best, self.shape["blocks"]).view(heads_kv, batch, 1, -1)
        return chosen.transpose(0, 1).contiguous()

    def attend(self, chosen: Tensor, layer: int = 0) -> Tensor:
        """[B, 1, Hq, D]"""
        k, v, _, _ = self.layers[layer]
        return self.module.infllmv2_attn_with_kvcache(self.q[:, None], k, v, cache_seqlens=self.lengths,
                                                      topk_idx=chosen)

    def step(self) -> None:
        for layer in range(len(self.layers)):
            self.attend(self.select(layer), layer)
