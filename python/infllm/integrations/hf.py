# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: ``attn_implementation="infllm"``.

    import infllm.integrations.hf as hf
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="infllm")
    hf.set_sparse_config(model, infllm.SparseConfig())  # without it: config.json's, or dense

Any model whose attention goes through transformers' AttentionInterface, causal and without sliding
windows. Padding masks are followed, and so are packed sequences, told by position_ids that begin
anew; once a forward pass that waits for the device. Sequences told by cu_seq_lens_q and the like
are not waited for, and are the way to have packed ones under torch.compile.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from infllm.attention import Options, attention
from infllm.checks import check_config
from infllm.config import SparseConfig

NAME = "infllm"


def register(name: str = NAME) -> None:
    """Makes ``attn_implementation=name`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, _mask)


def _mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0,
          kv_offset: int = 0, attention_mask: Tensor | None = None, device: Any = None,
          **_: Any) -> Tensor | None:
    """Nothing, or the [B, S] mask of padding: never one of [S, S]. A static cache has room behind
    its keys; the mask ends where they do."""
    held = int(q_offset) + q_length - kv_offset
    mask = None if attention_mask is None else attention_mask[:, -kv_length:][:, :held]
    if mask is not None and mask.shape[1] == held and bool(mask.all()):
        mask = None
    if mask is None and held < kv_length:
        mask = torch.ones(batch_size, held, dtype=torch.bool, device=device)
    return mask


def set_sparse_config(model: nn.Module, config: SparseConfig | None) -> None:
    """What the layers attend with; None: densely. The model saves it in its config.json."""
    check_config(config)
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    for found in configs:
        found.sparse_config = None if config is None else dataclasses.asdict(config)


def sparse_config_of(module: nn.Module) -> SparseConfig | None:
    """The config that was set, or that of config.json (``sparse_config``), or None."""
    values = getattr(getattr(module, "config", None), "sparse_config", None)
    if not isinstance(values, dict):
        return values
    if torch.compiler.is_compiling():
        return SparseConfig.from_dict(values)
    return _config_of(tuple(values.items()))


@functools.lru_cache(maxsize=64)
def _config_of(items: tuple[tuple[str, Any], ...]) -> SparseConfig:
    return SparseConfig.from_dict(dict(items))


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, Hq, Sq, D], key and value [B, Hkv, Sk, D].

    Returns [B, Sq, Hq, D] and None: there are no weights to show.
    """
    for name, given, expected in (("dropout", dropout, 0.0),
                                  ("is_causal", _is_causal(module, kwargs), True),
                                  ("sliding_window", kwargs.get("sliding_window"), None),
                                  ("softcap", kwargs.get("softcap"), None)):
        if given != expected:
            raise NotImplementedError(f"{name} = {given}, expected {expected}: this attention does "
                                      "not do the other")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: Options = {"sparse_config": sparse_config_of(module), "softmax_scale": scaling}
    starts = kwargs.get("cu_seq_lens_q")
    if starts is not None:
        out = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts,
                        kwargs["cu_seq_lens_k"], kwargs["max_length_q"], kwargs["max_length_k"],
                        **options)
        return out.view(q.shape), None
    if attention_mask is None:
        packed = _packed(kwargs.get("position_ids"), q, k)
        if packed is None:
            return attention(q, k, v, **options), None
        cu_seqlens, longest = packed
        out = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens,
                        max_seqlen_q=longest, **options)
        return out.view(q.shape), None
    if attention_mask.dim() != 2:
        raise NotImplementedError(f"attention_mask: {list(attention_mask.shape)}, expected the "
                                  "padding mask [B, S] or none")
    held = attention_mask.shape[1]
    return attend_padded(q, k[:, :held], v[:, :held], attention_mask.bool(), options), None


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    told = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if told is None else told)


_looked: tuple[Any, ...] = ()  # what the layers of a forward pass need not look at again


def _packed(position_ids: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, int] | None:
    """cu_seqlens and the longest sequence, where position_ids begin anew within a row."""
    global _looked
    batch, tokens = q.shape[:2]
    if (position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != tokens
            or tokens != k.shape[1] or tokens == 1):
        return None
    if torch.compiler.is_compiling():
        torch._assert_async((position_ids.diff() > 0).all(), "position_ids: they begin anew within "
                            "a row; under torch.compile packed sequences need cu_seq_lens_q, "
                            "cu_seq_lens_k, max_length_q and max_length_k")
        return None
    seen = (position_ids._version, batch) if not position_ids.is_inference() else None
    looked = _looked  # threads may look at others in between
    if looked and seen is not None and looked[0]() is position_ids and looked[1] == seen:
        return looked[2]
    begins = torch.nn.functional.pad(position_ids.diff() <= 0, (1, 0), value=True)
    found = None
    if bool(begins[:, 1:].any()):
        starts = begins.expand(batch, tokens).flatten().nonzero().flatten()
        ends = torch.nn.functional.pad(starts, (0, 1), value=batch * tokens)
        found = ends.to(torch.int32), int(ends.diff().max())
    _looked = weakref.ref(position_ids), seen, found
    return found


def attend_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: Options) -> Tensor:
    """Takes padding out, attends, and leaves zeros in its place; waits for the device.

    Args:
        q, k, v: [B, Sq, Hq, D] and [B, Sk, Hkv, D]; the queries are the last of the keys' tokens.
        mask: bool [B, Sk or more], false where there is padding.
        options: of ``attention``; q_score and k_score are shaped as q and k.
    """
    keys = mask[:, :k.shape[1]]
    queries = keys[:, keys.shape[1] - q.shape[1]:]
    starts_q, starts_k = (torch.nn.functional.pad(m.sum(1).cumsum(0), (1, 0)).to(torch.int32)
                          for m in (queries, keys))
    q_score, k_score = options.get("q_score"), options.get("k_score")
    if q_score is not None and k_score is not None:
        options = {**options, "q_score": q_score[queries], "k_score": k_score[keys]}
    packed = attention(q[queries], k[keys], v[keys], starts_q, starts_k, q.shape[1], k.shape[1],
                       **options)
    out = q.new_zeros(q.shape)
    out[queries] = packed
    return out
