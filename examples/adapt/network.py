# SPDX-License-Identifier: Apache-2.0
"""A MiniCPM4 model for training: packed rows of bf16, float32 weights, attention as an argument.

    h = scale_emb * E[token]
    every layer:  h += s * o_proj(attention(RMSNorm(h)))
                  h += s * down(silu(gate x) * up x),  x = RMSNorm(h),  s = scale_depth / sqrt(layers)
    logits = E (RMSNorm(h) * dim_model_base / hidden)

Parameter names are those of the Hugging Face checkpoint. What lies between two attentions is one
function of tensors, compiled once and used by all layers.
"""

import dataclasses
import json
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import infllm


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    sparse: infllm.SparseConfig
    max_position_embeddings: int = 65536
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    dim_model_base: int = 256
    initializer_range: float = 0.1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @staticmethod
    def load(folder) -> "Config":
        """Reads a Hugging Face config.json."""
        raw = json.loads((pathlib.Path(folder) / "config.json").read_text(encoding="utf-8"))
        names = {f.name for f in dataclasses.fields(Config)}
        values = {k: v for k, v in raw.items() if k in names}
        return Config(**values, sparse=infllm.SparseConfig.from_dict(raw["sparse_config"]))


def rope_table(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """cos, sin [T, D / 2], float32, for positions [T]."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    angles = positions[:, None].double() * config.rope_theta ** -exponent.double()
    return angles.cos().float(), angles.sin().float()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neox half rotation of x [T, H, D], computed in float32."""
    a, b = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def before_attention(h, weight, q_proj, k_proj, v_proj, cos, sin, eps: float, head_dim: int):
    """h [T, hidden] -> rotated q [T, Hq, D], k [T, Hkv, D], and v [T, Hkv, D]."""
    x = norm(h, weight, eps)
    joined = torch.cat([q_proj, k_proj, v_proj]).to(x.dtype)  # one product instead of three
    q, k, v = (
        y.unflatten(-1, (-1, head_dim))
        for y in F.linear(x, joined).split([w.shape[0] for w in (q_proj, k_proj, v_proj)], -1)
    )
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


def after_attention(h, out, o_proj, weight, gate, up, down, eps: float, scale: float):
    """The rest of a layer: h [T, hidden], out [T, Hq, D] -> h."""
    h = h + scale * F.linear(out.flatten(1), o_proj.to(h.dtype))
    x = norm(h, weight, eps)
    gate, up = F.linear(x, torch.cat([gate, up]).to(x.dtype)).chunk(2, -1)
    x = F.silu(gate) * up
    return h + scale * F.linear(x, down.to(x.dtype))


def token_losses(h, weight, embedding, target, eps: float, scale: float):
    """Cross-entropy [T], and the token of the largest logit [T]."""
    x = norm(h, weight, eps) * scale
    logits = F.linear(x, embedding.to(x.dtype)).float()
    return F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1)


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = MLP(config)


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)


class Network(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config, self.model = config, Decoder(config)
        self.functions = before_attention, after_attention, token_losses
        self.compiled = {}  # number of tokens -> the same, compiled
        for name, parameter in self.named_parameters():
            if "embed_tokens" in name:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))

    def compile(self, total: int) -> None:
        """From here on, batches of `total` tokens take a handful of kernels a layer, not forty."""
        if total not in self.compiled:
            self.compiled[total] = tuple(torch.compile(f, dynamic=False) for f in self.functions)

    def forward(self, tokens: Tensor, target: Tensor, cos: Tensor, sin: Tensor, attend):
        """tokens, target [T]: sequences of one length behind one another; cos, sin [T, D / 2].

        attend(layer, q, k, v) -> out [T, Hq, D]. Returns the losses [T] and the likeliest
        tokens [T].
        """
        c = self.config
        before, after, losses = self.compiled.get(len(tokens), self.functions)
        dtype = torch.bfloat16 if tokens.is_cuda else torch.float32
        scale = c.scale_depth / math.sqrt(c.num_hidden_layers)
        h = (F.embedding(tokens, self.model.embed_tokens.weight) * c.scale_emb).to(dtype)
        for i, layer in enumerate(self.model.layers):
            a, m = layer.self_attn, layer.mlp
            q, k, v = before(
                h, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight,
                cos, sin, c.rms_norm_eps, c.head_dim,
            )  # fmt: skip
            out = attend(i, q, k, v)
            h = after(
                h, out, a.o_proj.weight, layer.post_attention_layernorm.weight, m.gate_proj.weight,
                m.up_proj.weight, m.down_proj.weight, c.rms_norm_eps, scale,
            )  # fmt: skip
        return losses(
            h, self.model.norm.weight, self.model.embed_tokens.weight, target, c.rms_norm_eps,
            c.dim_model_base / c.hidden_size,
        )  # fmt: skip
