# SPDX-License-Identifier: Apache-2.0
"""InfLLM-V2 attention for PyTorch: dense on short inputs, sparse on long ones, same weights.

    import infllm

    config = infllm.SparseConfig()          # the released numbers
    out = infllm.attention(q, k, v, cu_seqlens, max_seqlen_q=longest, sparse_config=config)
    out.sum().backward()

q is [tokens, heads, head_dim], k and v are [tokens, kv_heads, head_dim]; see ``attention``.
"""

from infllm.align import selection_alignment_loss
from infllm.attention import attention, choose
from infllm.cache import KVCache, attend_with_kvcache
from infllm.checkpoint import save_selections
from infllm.columns import available
from infllm.config import SparseConfig
from infllm.plan import Plan, make_plan
from infllm.steps import attend, compress, score, select

__version__ = "0.1.0"  # pip reads it here

__all__ = [
    "KVCache",
    "Plan",
    "SparseConfig",
    "attend",
    "attend_with_kvcache",
    "attention",
    "available",
    "choose",
    "compress",
    "make_plan",
    "save_selections",
    "score",
    "select",
    "selection_alignment_loss",
]
