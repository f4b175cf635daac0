# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: the tokens of a batch spread over processes, keys and values gathered.

    plan = context_parallel.plan(cu_seqlens, group, sparse_config=config)   # once a batch
    x = context_parallel.shard(tokens, group)               # this process's share of the tokens
    ...
    out = context_parallel.attention(q, k, v, plan, sparse_config=config)   # in every layer

T tokens, packed sequences behind one another, are cut into W equal contiguous shards, one a
process, without regard to where sequences begin. A process computes q, k and v of its shard,
gathers K and V of all, and attends with its queries to the keys up to its shard's end: bottom-right
causal alignment gives every query its place. Backward, the gradients of the gathered K and V are
summed over the processes and scattered, in float32. Communication a layer is 2 T Hkv D elements
gathered and as many reduced, which is little for grouped keys: 0.13 GB of bf16 for 128K tokens and
2 heads of 128.

A sequence is sparse or dense as its whole length says. Dense attention gives later shards more to
do (a shard's queries see all keys before it); sparse attention gives all nearly the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from infllm.attention import attention as local_attention
from infllm.checks import check_tensors
from infllm.config import SparseConfig
from infllm.plan import Plan as LocalPlan
from infllm.plan import make_plan

# Newer torch calls them by the first name and warns at the second.
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What one process attends to in one batch: B' sequences reach into its shard."""

    group: Any  # the process group
    begin: int  # its tokens are [begin, end) of all
    end: int
    first_key: int  # its queries see keys of [first_key, end)
    local: LocalPlan  # B' sequences: queries within the shard, keys within [first_key, end)

    @property
    def tokens(self) -> int:
        """How many of all tokens are this process's."""
        return self.end - self.begin


def plan(
    cu_seqlens: Sequence[int] | Tensor,
    group: Any = None,
    *,
    sparse_config: SparseConfig | None = None,
    sparse: bool | None = None,
    device: Any = None,
) -> Plan:
    """The share of this process.

    Args:
        cu_seqlens: where each sequence begins among all T tokens, and T; the same on every process.
            A list, or a tensor, which is read once.
        group: the processes that share the tokens; None is all.
        sparse_config: None attends densely.
        sparse: None switches each sequence by its whole length; a bool decides for all.
        device: where the plan's tensors live; None is the current CUDA device under NCCL, else the
            CPU.
    """
    group = group if group is not None else dist.group.WORLD
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if device is None:
        nccl = dist.get_backend(group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"
    bounds = [int(x) for x in cu_seqlens]
    if len(bounds) < 2 or bounds[0] != 0 or any(b < a for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"cu_seqlens: {bounds}, expected 0 = c0 <= c1 <= ... <= T")
    total = bounds[-1]
    if total % world:
        raise ValueError(
            f"cu_seqlens: {total} tokens over {world} processes, expected a multiple; pad the "
            f"batch to {-(-total // world) * world}, for instance by a sequence of padding"
        )
    begin, end = total // world * rank, total // world * (rank + 1)
    mine = [(a, b) for a, b in zip(bounds, bounds[1:]) if max(a, begin) < min(b, end)]
    first_key = mine[0][0] if mine else begin
    queries = [0] + [min(b, end) - begin for _, b in mine]
    keys = [0] + [min(b, end) - first_key for _, b in mine]
    longest = [max((b - a for a, b in zip(x, x[1:])), default=0) for x in (queries, keys)]
    flags: bool | Tensor | None = sparse
    if sparse is None and sparse_config is not None:
        switched = [sparse_config.is_sparse_at(b - a) for a, b in mine]
        flags = torch.tensor(switched, device=device) if any(switched) else False
    cu_queries, cu_keys = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in (queries, keys)
    )
    local = make_plan(cu_queries, cu_keys, *longest, sparse_config=sparse_config, sparse=flags)
    return Plan(group, begin, end, first_key, local)


def shard(x: Tensor, group: Any = None, dim: int = 0) -> Tensor:
    """This process's share of a tensor that all processes have, whose size in `dim` is T."""
    group = group if group is not None else dist.group.WORLD
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if x.shape[dim] % world:
        raise ValueError(f"x: size {x.shape[dim]} over {world} processes, expected a multiple")
    return x.chunk(world, dim)[rank]


class _Gather(torch.autograd.Function):
    """[T / W, ...] of every process -> [T, ...]; backward sums in float32 and scatters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return funcol.wait_tensor(_all_gather(x.contiguous(), 0, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wide = grad.contiguous() if grad.dtype == torch.float64 else grad.float().contiguous()
        summed = _reduce_scatter(wide, "sum", 0, ctx.group)
        return funcol.wait_tensor(summed).to(grad.dtype), None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    sparse_config: SparseConfig | None = None,
    **options: Any,
) -> Any:
    """infllm.attention of sequences whose tokens are spread over processes.

    Args:
        q: [T / W, Hq, D], the shard's queries, after RoPE at their places in their sequences.
        k, v: [T / W, Hkv, D].
        plan: of this batch.
        sparse_config: the plan's.
        options: softmax_scale, selection, return_lse, return_selection and backend, as
            infllm.attention takes them.

    Returns:
        What infllm.attention returns, for the shard's queries.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: {type(plan)}, expected what context_parallel.plan returns")
    check_tensors(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[0] != plan.tokens:
            raise ValueError(f"{name}: {x.shape[0]} tokens, expected {plan.tokens}, the share of "
                             "this process in the plan's")
    if options.get("k_score") is not None:
        raise ValueError("k_score: not gathered; expected None (use_nope is not supported here)")
    keys, values = (_Gather.apply(x, plan.group)[plan.first_key : plan.end] for x in (k, v))
    return local_attention(q, keys, values, plan=plan.local, sparse_config=sparse_config, **options)
