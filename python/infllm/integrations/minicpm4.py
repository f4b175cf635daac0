# SPDX-License-Identifier: Apache-2.0
"""MiniCPM4 and MiniCPM4.1 models with remote code: their attention replaced by ours.

    import infllm.integrations.minicpm4 as minicpm4
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    minicpm4.patch(model)            # sparse_config of config.json, or dense
    minicpm4.unpatch(model)          # as it was

Neither ``flash_attn`` nor ``infllm_v2`` is needed then, and CPUs run it too. An attention module is
one whose children are ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` and ``rotary_emb`` (its
``compress_k`` and ``compress_k2`` go unused), with ``num_heads``, ``num_key_value_heads``,
``head_dim`` and ``layer_idx``, and whose class stands beside a function ``apply_rotary_pos_emb``.
Modules with more than that are refused: something would be left out. So is what ``attention`` does
not do: dropout, attention weights as an output, masks that are not of padding.

The keys stay in the model's own cache, so a decoding step copies them: ``infllm.KVCache`` does not,
and the engine of this repository needs no Python. Each sequence of a padded batch switches between
dense and sparse by its own length; the remote code lets the longest decide for all.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from infllm.attention import Options, attention
from infllm.config import SparseConfig
from infllm.integrations.hf import attend_padded

_STATE = "_infllm_patch"
_NEEDED = ("q_proj", "k_proj", "v_proj", "o_proj", "rotary_emb")
_NUMBERS = ("num_heads", "num_key_value_heads", "head_dim", "layer_idx")
_UNUSED = ("compress_k", "compress_k2")
_FLAGS = {"_use_flash_attention_2": True, "_use_sdpa": False}


def patch(model: nn.Module, sparse_config: SparseConfig | None = None, *,
          backend: str | None = None) -> nn.Module:
    """Replaces the attention of a loaded model; patched anew if it was already.

    Args:
        sparse_config: None takes ``model.config.sparse_config``; without one attention is dense.
            ``legacy_window=True, lse_source="fine"`` is what MiniCPM4's code of June 2025 does.
        backend: as in ``infllm.attention``.

    Returns:
        model.
    """
    unpatch(model)
    if sparse_config is None:
        values = getattr(getattr(model, "config", None), "sparse_config", None)
        sparse_config = SparseConfig.from_dict(values) if isinstance(values, dict) else values
    modules = [m for m in model.modules() if all(hasattr(m, name) for name in _NEEDED)]
    if not modules:
        raise ValueError(f"model: {type(model).__name__} has no module with {', '.join(_NEEDED)}, "
                         "expected MiniCPM4's remote code; a model of transformers itself takes "
                         'attn_implementation="infllm" (infllm.integrations.hf)')
    rotaries = [_checked(module) for module in modules]
    step = _Step(sparse_config, backend)
    for module, rotary in zip(modules, rotaries, strict=True):
        module.__dict__[_STATE] = (module.__dict__.get("forward"), step, rotary)
        module.__dict__["forward"] = types.MethodType(_forward, module)
    # The models build a [B, 1, S, S] mask unless told that attention takes the one of padding.
    for module in model.modules():
        if all(hasattr(module, name) for name in _FLAGS):
            hook = module.register_forward_pre_hook(_with_mask, with_kwargs=True)
            module.__dict__[_STATE] = (hook, {name: getattr(module, name) for name in _FLAGS})
            module.__dict__.update(_FLAGS)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes ``patch``; leaves other models alone. Returns model."""
    for module in model.modules():
        state = module.__dict__.pop(_STATE, None)
        if state is None:
            continue
        if isinstance(state[1], dict):
            hook, flags = state
            hook.remove()
            module.__dict__.update(flags)
        else:
            del module.__dict__["forward"]
            if state[0] is not None:
                module.__dict__["forward"] = state[0]
    return model


def _checked(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The module's ``apply_rotary_pos_emb``, if the module is one that we can stand in for."""
    name = type(module).__name__
    for attribute in _NUMBERS:
        if not hasattr(module, attribute):
            raise NotImplementedError(f"{name}: no {attribute}, expected MiniCPM4's attention")
    unknown = sorted(set(dict(module.named_children())) - {*_NEEDED, *_UNUSED})
    if unknown:
        raise NotImplementedError(f"{name}: has {', '.join(unknown)}, which this patch would leave "
                                  "out; expected MiniCPM4's attention")
    slices = getattr(getattr(module, "config", None), "pretraining_tp", 1)
    if slices != 1:
        raise NotImplementedError(f"{name}: pretraining_tp = {slices}, expected 1")
    if "seq_len" not in inspect.signature(module.rotary_emb.forward).parameters:
        raise NotImplementedError(f"{name}: rotary_emb takes no seq_len, expected MiniCPM4's")
    for base in type(module).__mro__:
        rotary = getattr(sys.modules.get(base.__module__), "apply_rotary_pos_emb", None)
        if rotary is not None:
            return rotary
    raise NotImplementedError(f"{name}: no apply_rotary_pos_emb in {type(module).__module__}")


def _with_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
               ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Without a mask nothing is padding; the models insist on being told."""
    if len(args) > 1 or kwargs.get("attention_mask") is not None:
        return None
    given: Any = args[0] if args else kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    cache: Any = kwargs.get("past_key_values")
    held = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    mask = torch.ones(given.shape[0], held + given.shape[1], dtype=torch.long, device=given.device)
    return args, {**kwargs, "attention_mask": mask}


@dataclasses.dataclass
class _Step:
    """What all layers attend with, and what the first one of a step found out for the others."""

    sparse_config: SparseConfig | None
    backend: str | None
    seen: dict[str, tuple[Tensor, int, Any]] = dataclasses.field(default_factory=dict)

    def once(self, what: str, x: Tensor, look: Callable[[Tensor], Any]) -> Any:
        """look(x), which waits for the device, unless x is the tensor that was looked at last."""
        if x.is_inference():  # nothing tells whether it was written to since
            return look(x)
        held = self.seen.get(what)
        if held is None or held[0] is not x or held[1] != x._version:
            self.seen[what] = held = (x, x._version, look(x))
        return held[2]

    def length(self, position_ids: Tensor) -> int:
        """The longest sequence's."""
        return self.once("positions", position_ids, lambda x: int(x.max()) + 1 if x.numel() else 0)

    def padding(self, mask: Tensor | None, keys: int) -> Tensor | None:
        """The mask of what is not padding, bool [B, keys], or None if nothing is."""
        if mask is None:
            return None
        if mask.dim() != 2 or mask.shape[1] < keys:
            raise NotImplementedError(f"attention_mask: {list(mask.shape)}, expected that of "
                                      f"padding, [B, {keys}], or none")
        return self.once("mask", mask, lambda x: None if bool(x.all()) else x.bool())


def _forward(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None, past_key_value: Any = None,
    output_attentions: bool = False, use_cache: bool = False, **kwargs: Any,
) -> tuple[Tensor, None, Any]:
    """An attention module's forward: hidden_states [B, S, E], attention_mask [B, keys] or None.

    Returns [B, S, E], None and the cache, as the remote code does.
    """
    _, step, rotary = self.__dict__[_STATE]
    if output_attentions:
        raise NotImplementedError("output_attentions = True, expected False: there are no weights "
                                  "to show")
    if self.training and getattr(self, "attention_dropout", 0.0):
        raise NotImplementedError(f"attention_dropout = {self.attention_dropout} while training, "
                                  "expected 0.0")
    batch, tokens, _ = hidden_states.shape
    q, k, v = (project(hidden_states).view(batch, tokens, heads, self.head_dim)
               for project, heads in ((self.q_proj, self.num_heads),
                                      (self.k_proj, self.num_key_value_heads),
                                      (self.v_proj, self.num_key_value_heads)))
    scores = _before_rope(self, step, q, k, past_key_value)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if position_ids is None:
        held = 0 if past_key_value is None else past_key_value.get_seq_length(self.layer_idx)
        position_ids = torch.arange(held, held + tokens, device=q.device)[None]
    cos, sin = self.rotary_emb(v.float(), seq_len=step.length(position_ids))
    q, k = rotary(q, k, cos, sin, position_ids)
    if past_key_value is not None:
        k, v = past_key_value.update(k, v, self.layer_idx, {"sin": sin, "cos": cos})
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options: Options = {"sparse_config": step.sparse_config, "backend": step.backend, **scores}
    seen = step.padding(kwargs.get("padding_mask", attention_mask), k.shape[1])
    out = attention(q, k, v, **options) if seen is None else attend_padded(q, k, v, seen, options)
    return self.o_proj(out.reshape(batch, tokens, -1)), None, past_key_value


def _before_rope(self: Any, step: _Step, q: Tensor, k: Tensor, cache: Any) -> Options:
    """Under use_nope, what scores the blocks; the remote code's cache keeps such keys too."""
    if step.sparse_config is None or not step.sparse_config.use_nope:
        return {}
    if cache is not None:
        if not hasattr(cache, "update_no_rope_key"):
            raise NotImplementedError(f"past_key_values: {type(cache).__name__} keeps no keys from "
                                      "before RoPE, expected the cache of the remote code")
        k = cache.update_no_rope_key(k, self.layer_idx)
    return {"q_score": q, "k_score": k}
