# SPDX-License-Identifier: Apache-2.0
"""A MiniCPM4 model in plain PyTorch: dense or InfLLM-V2 attention with the same weights.

    h = scale_emb * E[token]
    every layer:  h += s * o_proj(attention(RMSNorm(h)))
                  h += s * down(silu(gate x) * up x),  x = RMSNorm(h)
                  s = scale_depth / sqrt(layers)
    logits = E (RMSNorm(h) * dim_model_base / hidden)

Parameter names are those of the Hugging Face checkpoint, so export is a copy.
"""

import dataclasses
import json
import math

import selection
import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class Config:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 40960
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    dim_model_base: int = 64
    initializer_range: float = 0.1
    sparse: selection.SparseConfig = dataclasses.field(default_factory=selection.SparseConfig)

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @staticmethod
    def load(path):
        """Reads a Hugging Face config.json."""
        with open(path, encoding="utf-8") as file:
            raw = json.load(file)
        names = {f.name for f in dataclasses.fields(Config)}
        values = {k: v for k, v in raw.items() if k in names}
        return Config(**values, sparse=selection.SparseConfig(**raw["sparse_config"]))


def rope_table(positions, config):
    """cos, sin [..., T, d] in float32 for positions [..., T]."""
    exponent = (
        torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    )
    angles = positions[..., None].float() * config.rope_theta**-exponent
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Neox half rotation of x [N, H, T, d], computed in float32."""
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


def masked_attention(q, k, v, mask):
    """Attention under a bool mask [N, 1 or Hk, T, S]; float32 inside, for evaluation and tests."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if mask.shape[1] > 1:
        mask = mask.repeat_interleave(group, 1)
    logits = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
    return logits.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


def token_mask(selected, positions, length, block_size):
    """bool [N, Hk, T, length] from selected blocks [N, Hk, T, blocks] and the causal limit."""
    causal = torch.arange(length, device=positions.device) <= positions[:, None]
    return selected.repeat_interleave(block_size, -1)[..., :length] & causal


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
        n, rows, _ = x.shape
        q, k, v = (
            project(x).view(n, rows, -1, self.config.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.transpose(1, 2).reshape(n, rows, -1))


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
    """`attend` decides how: called once a layer with rotated q, k and v, it returns the output."""

    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, Decoder(config)
        for name, parameter in self.named_parameters():
            if "embed_tokens" in name:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))

    def hidden(self, tokens, positions, attend):
        """tokens [N, T]; positions [T] or [N, T]; attend(layer index) -> function of q, k, v."""
        cos, sin = rope_table(positions, self.config)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]
        h = self.model.embed_tokens(tokens) * self.config.scale_emb
        for i, layer in enumerate(self.model.layers):
            h = layer(h, cos, sin, attend(i))
        return self.model.norm(h)

    def logits(self, h):
        scaled = h * (self.config.dim_model_base / self.config.hidden_size)
        return F.linear(scaled, self.model.embed_tokens.weight.to(scaled.dtype))


class Cache:
    """Rotated keys and values of everything read so far, one tensor pair a layer."""

    def __init__(self, layers):
        self.keys, self.values = [None] * layers, [None] * layers

    def length(self):
        return 0 if self.keys[0] is None else self.keys[0].shape[2]

    def branch(self, rows):
        """A cache that `rows` sequences share and extend apart."""
        other = Cache(len(self.keys))
        other.keys = [k.expand(rows, -1, -1, -1) for k in self.keys]
        other.values = [v.expand(rows, -1, -1, -1) for v in self.values]
        return other

    def extend(self, layer, k, v):
        if self.keys[layer] is not None:
            k = torch.cat([self.keys[layer], k], 2)
            v = torch.cat([self.values[layer], v], 2)
        self.keys[layer], self.values[layer] = k, v
        return k, v


@torch.no_grad()
def read(model, tokens, cache, sparse, chunk=1024, kept=None):
    """Runs tokens [N, T] after what the cache holds; returns the hidden state of the last `kept`.

    sparse: choose blocks (the caller has compared the whole length with dense_len).
    """
    config = model.config
    outputs = []
    for part in tokens.split(chunk, 1):
        positions = torch.arange(cache.length(), cache.length() + part.shape[1], device=part.device)

        def attend(layer):
            def run(q, k, v):
                k, v = cache.extend(layer, k, v)
                length = k.shape[2]
                if sparse:
                    chosen = selection.select(q, k, positions, config.sparse, stable=True)
                    mask = token_mask(chosen, positions, length, config.sparse.block_size)
                else:
                    mask = (torch.arange(length, device=q.device) <= positions[:, None])[None, None]
                return masked_attention(q, k, v, mask)

            return run

        outputs.append(model.hidden(part, positions, attend))
    h = torch.cat(outputs, 1)
    return h[:, -kept:] if kept else h
