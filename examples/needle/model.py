# SPDX-License-Identifier: Apache-2.0
"""A MiniCPM4 model in plain PyTorch, its attention left to the caller: dense or sparse.

    h = scale_emb * E[token]
    every layer:  h += s * o_proj(attention(RMSNorm(h)))
                  h += s * down(silu(gate x) * up x),  x = RMSNorm(h)
                  s = scale_depth / sqrt(layers)
    logits = E (RMSNorm(h) * dim_model_base / hidden)

Parameter names are those of the Hugging Face checkpoint, so export is a copy.
"""

import dataclasses
import functools
import json
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

import infllm

SPARSE = infllm.SparseConfig(window_size=512, topk=22, dense_len=2048)
SETTLED = 32  # turns


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 40960
    original_max_position_embeddings: int | None = None  # LongRoPE's long factors above it
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    dim_model_base: int = 64
    initializer_range: float = 0.1
    sparse: infllm.SparseConfig = SPARSE

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def original_length(self):
        return self.original_max_position_embeddings or self.max_position_embeddings

    @functools.cached_property
    def long_factor(self):
        """By how much each pair of dimensions turns slower above the original length.

        Pairs that turned more than SETTLED times over the original length keep their speed, those
        that turned less than once are slowed by max / original, between the two by a line in turns.
        """
        stretch = self.max_position_embeddings / self.original_length
        factors = []
        for i in range(self.head_dim // 2):
            period = 2 * math.pi * self.rope_theta ** (2 * i / self.head_dim)
            turns = self.original_length / period
            kept = min(1.0, max(0.0, (turns - 1) / (SETTLED - 1)))
            factors.append(round(1 / (kept + (1 - kept) / stretch), 6))
        return factors

    @staticmethod
    def load(folder):
        """Reads a Hugging Face config.json."""
        raw = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
        raw.update(raw["rope_scaling"])
        names = {f.name for f in dataclasses.fields(Config)}
        values = {k: v for k, v in raw.items() if k in names}
        return Config(**values, sparse=infllm.SparseConfig.from_dict(raw["sparse_config"]))


def rope_table(positions, config):
    """cos, sin [N, T, 1, d] in float32 for positions [N, T]; each row has its own factors."""
    half = config.head_dim // 2
    exponent = torch.arange(half, device=positions.device).float() / half
    factors = positions.new_tensor(config.long_factor, dtype=torch.float32)
    is_long = positions.amax(-1, keepdim=True) >= config.original_length
    scale = torch.where(is_long[..., None], 1 / factors, torch.ones_like(factors))
    angles = positions[..., None].float() * (config.rope_theta**-exponent * scale)
    angles = torch.cat([angles, angles], -1)[:, :, None]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Neox half rotation of x [N, T, H, d], computed in float32."""
    y = x.float()
    a, b = y.chunk(2, -1)
    return (y * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        d, hidden = config.head_dim, config.hidden_size
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, hidden, bias=False)

    def forward(self, x, cos, sin, attend):
        q, k, v = (
            project(x).unflatten(-1, (-1, self.config.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attend(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.scale = config.scale_depth / math.sqrt(config.num_hidden_layers)

    def forward(self, h, cos, sin, attend):
        h = h + self.scale * self.self_attn(self.input_layernorm(h), cos, sin, attend)
        return h + self.scale * self.mlp(self.post_attention_layernorm(h))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MiniCPM4(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, Decoder(config)
        for name, parameter in self.named_parameters():
            if "embed_tokens" in name:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))

    def forward(self, tokens, positions, attend):
        """tokens, positions [N, T] -> logits [N, T, vocabulary].

        attend(layer): a function of rotated q [N, T, Hq, d], k, v [N, T, Hkv, d] that returns the
        output, shaped like q.
        """
        cos, sin = rope_table(positions, self.config)
        h = self.model.embed_tokens(tokens) * self.config.scale_emb
        for i, layer in enumerate(self.model.layers):
            h = layer(h, cos, sin, attend(i))
        h = self.model.norm(h) * (self.config.dim_model_base / self.config.hidden_size)
        return F.linear(h, self.model.embed_tokens.weight.to(h.dtype))
