# SPDX-License-Identifier: Apache-2.0
"""The switchable attention: dense on short inputs, sparse on long ones, same weights."""

from __future__ import annotations

from torch import Tensor

from infllm.config import SparseConfig


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    sparse_config: SparseConfig | None = None,
    softmax_scale: float | None = None,
    sparse: bool | Tensor | None = None,
    selection: Tensor | None = None,
    q_score: Tensor | None = None,
    k_score: Tensor | None = None,
    return_lse: bool = False,
    return_selection: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Causal attention over packed sequences, dense or over the blocks that matter.

    Shapes: T query tokens and S key tokens, packed; Hq query heads in groups over Hkv KV heads; B
    sequences. The queries of a sequence are its last tokens (bottom-right causal), so
    ``len_q <= len_k`` and a shard of the queries may be given with all keys up to its end.

    Args:
        q: [T, Hq, D] after RoPE; or [B, Sq, Hq, D] for sequences of one length, without cu_seqlens.
        k, v: [S, Hkv, D]; or [B, Sk, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], where each sequence begins. None: one sequence.
            cu_seqlens_k None: the same as cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: the longest sequence, or a bound on it. Needed with cu_seqlens
            on CUDA, where looking would wait for the device.
        sparse_config: None attends densely to everything.
        softmax_scale: None is D ** -0.5.
        sparse: None switches each sequence by ``sparse_config.dense_len`` on its number of keys. A
            bool, or a bool tensor [B], decides instead (a shard of a sequence takes the whole
            sequence's answer).
        selection: int32 [Hkv, T, K], ascending block indices with -1 behind them, to attend to
            these blocks; none are chosen then. Used for the sequences that are sparse.
        q_score, k_score: like q and k, before RoPE, when ``sparse_config.use_nope``.
        return_lse: also the log-sum-exp, float32 [Hq, T], differentiable.
        return_selection: also the selection, int32 [Hkv, T, K], K = ``sparse_config.columns(
            max_seqlen_k)``; K = 0 where no sequence can be sparse. Rows of dense sequences are -1.
        backend: None chooses by device and dtype; "reference" computes in float64 on the CPU.

    Returns:
        out like q, or a tuple (out, lse, selection) of what was asked for. Gradients reach q, k and
        v through out and lse; the selection is held constant.
    """
    raise NotImplementedError
