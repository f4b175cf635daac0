# SPDX-License-Identifier: Apache-2.0
"""A stand-in for MiniCPM4's remote code: the attributes that the patch counts on, nothing else."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn


def rotate_half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor,
                         unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q and k are [B, H, S, D]."""
    cos, sin = (x[position_ids].unsqueeze(unsqueeze_dim) for x in (cos, sin))
    return tuple((x * cos + rotate_half(x) * sin).to(x.dtype) for x in (q, k))


class Rotary(nn.Module):
    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        rates = 10000.0 ** (-torch.arange(0, self.head_dim, 2, device=x.device) / self.head_dim)
        angles = torch.outer(torch.arange(seq_len, device=x.device), rates).repeat(1, 2)
        return angles.cos(), angles.sin()


class Cache:
    """Of every layer, the keys [B, Hkv, S, D] and values so far."""

    def __init__(self, layers: int) -> None:
        self.held: list[list[Tensor]] = [[] for _ in range(layers)]
        self.before_rope: dict[int, Tensor] = {}

    def get_seq_length(self, layer: int = 0) -> int:
        return self.held[layer][0].shape[2] if self.held[layer] else 0

    def update(self, k: Tensor, v: Tensor, layer: int, _: Any) -> tuple[Tensor, Tensor]:
        old = self.held[layer]
        self.held[layer] = [torch.cat([x, y], 2) for x, y in zip(old, (k, v), strict=True)] \
            if old else [k, v]
        return self.held[layer][0], self.held[layer][1]


class CacheBeforeRope(Cache):
    """Keeps [B, S, Hkv, D] from before RoPE too, as use_nope needs it."""

    def update_no_rope_key(self, k: Tensor, layer: int) -> Tensor:
        held = self.before_rope.get(layer)
        self.before_rope[layer] = k if held is None else torch.cat([held, k], 1)
        return self.before_rope[layer]


class Attention(nn.Module):
    """Plain attention with a mask [B, 1, Sq, Sk], which the patch replaces."""

    def __init__(self, layer_idx: int, hidden: int, heads: int, heads_kv: int) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(pretraining_tp=1)
        self.layer_idx = layer_idx
        self.num_heads = heads
        self.num_key_value_heads = heads_kv
        self.head_dim = hidden // heads
        self.attention_dropout = 0.0
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, heads_kv * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, heads_kv * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.rotary_emb = Rotary(self.head_dim)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_value: Cache | None = None,
                output_attentions: bool = False, use_cache: bool = False,
                ) -> tuple[Tensor, None, Cache | None]:
        batch, tokens, _ = hidden_states.shape
        q, k, v = (project(hidden_states).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = self.rotary_emb(v, seq_len=int(position_ids.max()) + 1)
        q, k = apply_rotary_pos_emb(q, k, cos, sin, position_ids)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx, {})
        out = nn.functional.scaled_dot_product_attention(q, k, v, attention_mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None, past_key_value


class Model(nn.Module):
    """Attention layers with residuals; the base model's flags and masks."""

    def __init__(self, layers: int = 2, hidden: int = 64, heads: int = 4, heads_kv: int = 2,
                 sparse_config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(sparse_config=sparse_config)
        self.layers = nn.ModuleList(Attention(i, hidden, heads, heads_kv) for i in range(layers))
        self._use_flash_attention_2 = False
        self._use_sdpa = True

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None,
                past_key_values: Cache | None = None) -> Tensor:
        batch, tokens, _ = inputs_embeds.shape
        held = past_key_values.get_seq_length() if past_key_values is not None else 0
        device = inputs_embeds.device
        position_ids = torch.arange(held, held + tokens, device=device)[None]
        if self._use_flash_attention_2:
            if attention_mask is None:
                raise ValueError("need attention_mask")
        else:
            causal = torch.ones(tokens, held + tokens, dtype=torch.bool, device=device).tril(held)
            seen = True if attention_mask is None else attention_mask.bool()[:, None, None]
            attention_mask = (causal & seen).expand(batch, 1, -1, -1)
        x = inputs_embeds
        for layer in self.layers:
            x = x + layer(hidden_states=x, attention_mask=attention_mask,
                          position_ids=position_ids, past_key_value=past_key_values,
                          use_cache=past_key_values is not None)[0]
        return x
