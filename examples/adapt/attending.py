# SPDX-License-Identifier: Apache-2.0
"""The attentions of the experiment, for sequences of one length behind one another."""

import dataclasses

import infllm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Dense attention of the baseline: what a PyTorch user has without this project, best first.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def dense(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Causal attention by PyTorch. q [T, Hq, D], k, v [T, Hkv, D], T = sequences x length."""
    q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


@dataclasses.dataclass
class Attend:
    """attend(layer, q, k, v) of one batch; collects the alignment losses of the layers it teaches.

    length: of every sequence; sparse: the config to select with, None: dense everywhere
    taught: layers whose selection is taught; rows: how many rows of a batch teach it
    """

    length: int
    sparse: infllm.SparseConfig | None = None
    taught: tuple = ()
    rows: Tensor | None = None
    config: infllm.SparseConfig | None = None
    losses: list = dataclasses.field(default_factory=list)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total = q.shape[0]
        cu = torch.arange(0, total + 1, self.length, dtype=torch.int32, device=q.device)
        if layer in self.taught:
            self.losses.append(
                infllm.selection_alignment_loss(
                    q, k, cu, max_seqlen=self.length, rows=self.rows, sparse_config=self.config
                )
            )
        if self.sparse is None or not self.sparse.is_sparse_at(self.length):
            return dense(q, k, v, self.length)
        return infllm.attention(
            q, k, v, cu, cu, self.length, self.length, sparse_config=self.sparse
        )
