# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.infllm.*``: schemas, kernels, fake kernels, gradients.

They are what torch.compile and CUDA graphs see. Every shape follows from shapes and ints, no kernel
waits for the device, and all memory is PyTorch's. ``config`` is ``SparseConfig.numbers()``, empty
for attention that is always dense; the other arguments are those of ``infllm.attention`` and the
fields of ``infllm.Plan``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from infllm.call import Call, columns_of, config_of, lse_type
from infllm.checks import check_batch, check_like, check_qkv, check_scores, check_selection
from infllm.config import SparseConfig
from infllm.plan import Batch

BATCH = ("Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor kv_length, Tensor page_table, "
          "Tensor? sparse, SymInt max_seqlen_q, SymInt max_seqlen_k")
OPTIONS = "float scale, int[] config, str backend"

library = torch.library.Library("infllm", "DEF")
library.define(f"attention(Tensor q, Tensor k, Tensor v, Tensor? q_score, Tensor? k_score, "
                f"Tensor? selection, {BATCH}, {OPTIONS}) -> (Tensor, Tensor, Tensor)")
library.define(f"attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, "
                f"Tensor v, Tensor out, Tensor lse, Tensor? selection, {BATCH}, {OPTIONS}) "
                "-> (Tensor, Tensor, Tensor)")
library.define(f"choose(Tensor q, Tensor k, Tensor? q_score, Tensor? k_score, {BATCH}, "
                f"{OPTIONS}) -> Tensor")


def implement(name: str, kernel: Any, fake: Any) -> None:
    for device in ("CPU", "CUDA"):
        library.impl(name, kernel, device)
    torch.library.register_fake(f"infllm::{name}", fake, lib=library)


def differentiate(name: str, save: Callable[..., None], gradients: Callable[..., Any],
                  ) -> Callable[..., Any]:
    """Gives an operator its gradients. Returns it, for calls that torch.func may transform: what
    torch.library makes of the gradients does not take part in that."""
    torch.library.register_autograd(f"infllm::{name}", gradients, setup_context=save, lib=library)
    operator = getattr(torch.ops.infllm, name)
    transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
    transformed: Any = type(name, (torch.autograd.Function,), {
        "forward": staticmethod(operator), "setup_context": staticmethod(save),
        "backward": staticmethod(gradients), "generate_vmap_rule": True})

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or not transforming():
            return operator(*inputs)
        return transformed.apply(*inputs)

    return call


def once(name: str) -> Callable[..., Any]:
    """Refuses to differentiate an operator that gives gradients: PyTorch would take theirs for
    zero."""
    def refuse(_ctx: Any, *_grads: Any) -> Any:
        raise RuntimeError("infllm: a second derivative was asked for, but there is only a first; "
                           "leave out create_graph=True")

    return differentiate(name, lambda ctx, inputs, output: None, refuse)


def _check(q: Tensor, k: Tensor, v: Tensor, batch: Batch,
           config: Sequence[int]) -> SparseConfig:
    check_qkv(q, k, v)
    numbers, _ = config_of(tuple(config))
    check_batch(q, *batch, numbers)
    return numbers


# ---- attention ----------------------------------------------------------------------------------


def _attention_shapes(
    q: Tensor, k: Tensor, v: Tensor, q_score: Tensor | None, k_score: Tensor | None,
    selection: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_length: Tensor,
    page_table: Tensor, sparse: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, scale: float,
    config: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = _check(q, k, v, (cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse,
                               max_seqlen_q, max_seqlen_k), config)
    columns = 0
    if selection is not None:
        check_selection(selection, q, k.shape[1])
    else:
        check_scores(q_score, k_score, q, k, numbers if config else None)
        columns = columns_of(numbers, sparse, max_seqlen_k)
    return (q.new_empty(q.shape),
            q.new_empty((q.shape[1], q.shape[0]), dtype=lse_type(q)),
            q.new_empty((k.shape[1], q.shape[0], columns), dtype=torch.int32))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, q_score: Tensor | None, k_score: Tensor | None,
    selection: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, kv_length: Tensor,
    page_table: Tensor, sparse: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, scale: float,
    config: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = (cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse, max_seqlen_q, max_seqlen_k)
    call = Call(q, k, v, batch, config, backend, chooses=selection is None)
    call.check(q, k, q_score, k_score, selection)
    out, lse, chosen = call.forward(q, k, v, q_score, k_score, selection, scale)
    return out, lse, call.no_blocks() if chosen is None else chosen


implement("attention", _attention, _attention_shapes)


def _backward_shapes(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.empty(q.shape, dtype=q.dtype, device=q.device),
            torch.empty(k.shape, dtype=k.dtype, device=k.device),
            torch.empty(v.shape, dtype=v.dtype, device=v.device))


def _attention_backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, selection: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    kv_length: Tensor, page_table: Tensor, sparse: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, config: Sequence[int], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if selection is None:
        sparse = None
    batch = (cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse, max_seqlen_q, max_seqlen_k)
    call = Call(q, k, v, batch, config, backend, chooses=False)
    check_like("out", out, q, "q")
    check_like("grad_out", grad_out, q, "q")
    check_like("grad_lse", grad_lse, lse, "lse")
    if selection is not None:
        call.check_selection(selection, q)
    return call.backward(grad_out, grad_lse, q, k, v, out, lse, selection, scale)


implement("attention_backward", _attention_backward, _backward_shapes)
attention_backward = once("attention_backward")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, _, selection, *batch, max_seqlen_q, max_seqlen_k, scale, config, backend = inputs
    out, lse, chosen = output
    if selection is None and chosen.shape[2] > 0:
        selection = chosen
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(chosen)
    ctx.save_for_backward(q, k, v, out, lse, selection, *batch)
    ctx.options = (max_seqlen_q, max_seqlen_k, scale, config, backend)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> Any:
    none = [None] * 13
    if grad_out is None and grad_lse is None:
        return None, None, None, *none
    return *attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.options), *none


attention = differentiate("attention", _save, _gradients)

# ---- the choice alone ---------------------------------------------------------------------------


def _choose_shapes(
    q: Tensor, k: Tensor, q_score: Tensor | None, k_score: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, kv_length: Tensor, page_table: Tensor, sparse: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, scale: float, config: Sequence[int], backend: str,
) -> Tensor:
    numbers = _check(q, k, k, (cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse,
                               max_seqlen_q, max_seqlen_k), config)
    check_scores(q_score, k_score, q, k, numbers)
    return torch.empty((k.shape[1], q.shape[0], columns_of(numbers, sparse, max_seqlen_k)),
                       dtype=torch.int32, device=q.device)


def _choose(
    q: Tensor, k: Tensor, q_score: Tensor | None, k_score: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, kv_length: Tensor, page_table: Tensor, sparse: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, scale: float, config: Sequence[int], backend: str,
) -> Tensor:
    batch = (cu_seqlens_q, cu_seqlens_k, kv_length, page_table, sparse, max_seqlen_q, max_seqlen_k)
    call = Call(q, k, k, batch, config, backend, chooses=True)
    call.check(q, k, q_score, k_score, None)
    return call.choose(q, k, q_score, k_score, scale)


implement("choose", _choose, _choose_shapes)
