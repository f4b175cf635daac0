# SPDX-License-Identifier: Apache-2.0
"""Where the sequences of a batch lie; made once a step and read by every layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from infllm.checks import check_config, check_count, check_ints, check_switch
from infllm.config import SparseConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What ``make_plan`` returns; ``attention(plan=...)`` takes it in place of cu_seqlens."""

    cu_seqlens_q: Tensor  # int32 [B + 1]
    cu_seqlens_k: Tensor  # int32 [B + 1]
    kv_length: Tensor  # int32 [B]
    page_table: Tensor  # int32 [B, pages of the longest sequence]
    sparse: Tensor | None  # bool [B]; None: no sequence can be sparse
    max_seqlen_q: int
    max_seqlen_k: int
    sparse_config: SparseConfig | None = None  # what ``sparse`` was decided with

    def __getstate__(self) -> dict[str, Any]:
        """Without what ``infllm.eager`` keeps here: that belongs to the process."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


# What an operator takes of a plan: its fields up to max_seqlen_k.
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, int, int]


def batch_of(plan: Plan) -> Batch:
    """The fields as the operators take them."""
    return (plan.cu_seqlens_q, plan.cu_seqlens_k, plan.kv_length, plan.page_table, plan.sparse,
            plan.max_seqlen_q, plan.max_seqlen_k)


def check_plan(plan: Any, config: SparseConfig | None, *, switches: bool = True) -> None:
    """A plan that was made for this config. switches: the flags of its sequences matter, too."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: {type(plan)}, expected what infllm.make_plan returns")
    made = plan.sparse_config
    if made is config or config is None:
        return
    if switches and made is None:
        raise ValueError("plan: made without sparse_config, so that no sequence could be sparse; "
                         "pass it to make_plan too")
    for name in ("block_size", "dense_len") if switches else ("block_size",):
        found, expected = getattr(made or SparseConfig(), name), getattr(config, name)
        if found != expected:
            raise ValueError(f"plan: made for {name} = {found}, but sparse_config has {expected}; "
                             "expected the same")


def make_plan(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    sparse_config: SparseConfig | None = None,
    sparse: bool | Tensor | None = None,
) -> Plan:
    """Plans a batch of B packed sequences, without waiting for the device.

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1]; cu_seqlens_k None: the same.
        max_seqlen_q, max_seqlen_k: the longest sequences, or bounds on them.
        sparse_config, sparse: as in ``attention``.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_ints(name, cu, "[B + 1]")
    max_seqlen_q = check_count("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = check_count("max_seqlen_k", max_seqlen_k)
    check_config(sparse_config)
    sequences = cu_seqlens_k.shape[0] - 1
    if cu_seqlens_q.shape[0] - 1 != sequences:
        raise ValueError(f"cu_seqlens_q: {cu_seqlens_q.shape[0] - 1} sequences, but cu_seqlens_k "
                         f"has {sequences}; expected as many")
    if cu_seqlens_q.device != cu_seqlens_k.device:
        raise ValueError(f"cu_seqlens_q: on {cu_seqlens_q.device}, but cu_seqlens_k is on "
                         f"{cu_seqlens_k.device}; expected one device")
    config = sparse_config or SparseConfig()
    starts, ends = cu_seqlens_k[:-1], cu_seqlens_k[1:]
    kv_length = ends - starts
    # Sequence s begins at page starts[s] // size + s: far enough from the one before for every
    # mixture of lengths, and known without adding up.
    pages = torch.arange(config.blocks_in(max_seqlen_k), dtype=torch.int32, device=starts.device)
    index = torch.arange(sequences, dtype=torch.int32, device=starts.device)
    page_table = (starts // config.block_size + index)[:, None] + pages
    return Plan(cu_seqlens_q, cu_seqlens_k, kv_length, page_table,
                sparse_flags(kv_length, max_seqlen_k, sparse_config, sparse), max_seqlen_q,
                max_seqlen_k, sparse_config)


def uniform_plan(batch: int, seqlen_q: int, seqlen_k: int, device: torch.device, *,
                 sparse_config: SparseConfig | None, sparse: bool | Tensor | None) -> Plan:
    """The plan of ``batch`` sequences of one length."""
    index = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return make_plan(index * seqlen_q, index * seqlen_k, seqlen_q, seqlen_k,
                     sparse_config=sparse_config, sparse=sparse)


def page_count(total_k: int, sequences: int, config: SparseConfig) -> int:
    """Pages that a plan's table may name."""
    return total_k // config.block_size + sequences


def sparse_flags(kv_length: Tensor, max_seqlen_k: int, config: SparseConfig | None,
                 sparse: bool | Tensor | None) -> Tensor | None:
    """Which sequences are sparse, bool [B]; None where none can be."""
    check_switch(sparse)
    if config is None:
        if sparse is not None and sparse is not False:
            raise ValueError("sparse: given without sparse_config; pass the config too")
        return None
    if isinstance(sparse, Tensor):
        if sparse.dtype is not torch.bool or sparse.shape != kv_length.shape:
            raise ValueError(f"sparse: {sparse.dtype} {list(sparse.shape)}, expected bool "
                             f"{list(kv_length.shape)}")
        return sparse.to(kv_length.device)
    if sparse is None:
        return kv_length >= config.dense_len if max_seqlen_k >= config.dense_len else None
    return torch.ones_like(kv_length, dtype=torch.bool) if sparse else None
