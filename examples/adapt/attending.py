# SPDX-License-Identifier: Apache-2.0
"""The attentions of the experiment, for sequences of one length behind one another."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import infllm

# Dense attention of the baseline: what a PyTorch user has without this project, best first.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way of continuing. sparse: attends to chosen blocks; taught: with the alignment loss."""

    sparse: bool
    taught: bool


ARMS = {
    "dense": Arm(sparse=False, taught=False),
    "sparse": Arm(sparse=True, taught=False),
    "aligned": Arm(sparse=True, taught=True),
    "taught": Arm(sparse=False, taught=True),
}


def dense(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Causal attention by PyTorch. q [T, Hq, D], k, v [T, Hkv, D], T = sequences x length."""
    q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


@dataclasses.dataclass
class Attend:
    """attend(layer, q, k, v) of one batch; collects the alignment losses of the layers it teaches.

    total, length: tokens of the batch and of every sequence
    sparse: the config to select with; None attends densely
    taught, rows, config: layers whose selection is taught, by which rows, for which config
    """

    total: int
    length: int
    device: torch.device
    sparse: infllm.SparseConfig | None = None
    taught: tuple = ()
    rows: Tensor | None = None
    config: infllm.SparseConfig | None = None
    losses: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.plan = None
        if self.sparse is not None and not self.sparse.is_sparse_at(self.length):
            self.sparse = None
        self.rows = None if self.rows is None else self.rows.to(self.device)
        if self.sparse is not None or self.taught:
            cu = torch.arange(
                0, self.total + 1, self.length, dtype=torch.int32, device=self.device
            )
            self.plan = infllm.make_plan(
                cu, None, self.length, self.length, sparse_config=self.sparse
            )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.taught:
            loss = infllm.selection_alignment_loss(
                q, k, plan=self.plan, rows=self.rows, sparse_config=self.config
            )
            self.losses.append(loss.mean())
        if self.sparse is None:
            return dense(q, k, v, self.length)
        return infllm.attention(q, k, v, plan=self.plan, sparse_config=self.sparse)
