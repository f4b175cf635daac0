# SPDX-License-Identifier: Apache-2.0
"""InfLLM-V2 attention for PyTorch: dense on short inputs, sparse on long ones, same weights.

    import infllm

    config = infllm.SparseConfig()          # the released numbers
    out = infllm.attention(q, k, v, cu_seqlens, max_seqlen_q=longest, sparse_config=config)
    out.sum().backward()

q is [tokens, heads, head_dim], k and v are [tokens, kv_heads, head_dim]; see ``attention``.
"""

from infllm.attention import attention, choose
from infllm.columns import available
from infllm.config import SparseConfig
from infllm.plan import Plan, make_plan

__all__ = ["Plan", "SparseConfig", "attention", "available", "choose", "make_plan"]
