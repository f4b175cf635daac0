# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a tensor, and in which types."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from infllm import _native
from infllm.checks import check_type

_TORCH_TYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16,
                "f16": torch.float16}
_ALIGNMENT = 16  # bytes; what the device's copy engine asks of an array


# What Inductor's code calls; the public way makes an object of the stream first.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def stream_of(device: torch.device) -> int:
    """The current stream of a CUDA device, as a cudaStream_t."""
    if _raw_stream is None or device.index is None:
        return torch.cuda.current_stream(device).cuda_stream
    return _raw_stream(device.index)


class Column:
    """An opened backend: where its arrays live, the type they have, and that of its cache."""

    def __init__(self, name: str, threads: int, dtype: torch.dtype) -> None:
        self.native = _native.Device(name, threads)
        self.is_cuda = self.native.name.startswith("cuda")
        ordinal = self.native.name.split(":")[1] if self.is_cuda else ""
        self.device = torch.device(f"cuda:{ordinal}" if self.is_cuda else "cpu")
        self.activation = _TORCH_TYPES[self.native.activation]
        self.accumulate = (torch.float64 if self.activation is torch.float64 else torch.float32)
        if self.activation is torch.float32:  # of bf16 numbers a host keeps no more than they are
            self.cache = "bf16" if dtype is torch.bfloat16 else "f32"
        else:
            self.cache = self.native.activation

    def stream(self) -> int:
        """The caller's stream as the native side takes it."""
        return stream_of(self.device) if self.is_cuda else 0

    def numbers(self, x: Tensor) -> Tensor:
        """x in the column's type, contiguous and aligned; x itself where it is that already."""
        if x.dtype is not self.activation or x.device != self.device or not x.is_contiguous():
            x = x.detach().to(device=self.device, dtype=self.activation).contiguous()
        return x.detach().clone() if x.data_ptr() % _ALIGNMENT else x

    def sums(self, x: Tensor) -> Tensor:
        """x in the type that the column sums up in."""
        if x.dtype is self.accumulate and x.device == self.device and x.is_contiguous():
            return x
        return x.to(device=self.device, dtype=self.accumulate).contiguous()

    def place(self, x: Tensor) -> Tensor:
        """An integer array where the column reads it."""
        if x.device == self.device and x.is_contiguous():
            return x
        return x.to(self.device).contiguous()

    def empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def bytes(self, count: int) -> Tensor:
        """Memory of the caller's allocator: for workspaces and pages."""
        return torch.empty(count, dtype=torch.uint8, device=self.device)


@functools.cache
def _open(name: str, threads: int, dtype: torch.dtype, _process: int) -> Column:
    # A forked process has none of its parent's threads, so it opens its own.
    return Column(name, threads, dtype)


def column_of(x: Tensor, backend: str = "", argument: str = "q") -> Column:
    """The column that runs x: ``backend`` if it is named, else the best for its device and type.

    float64 runs on the reference. CUDA takes bfloat16 and float16, the CPU float32 too. argument:
    what the caller calls x.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend: {backend!r}, expected None or one of {', '.join(available())}")
    check_type(argument, x.dtype)
    name = backend
    if x.device.type == "cuda":
        if x.dtype not in (torch.bfloat16, torch.float16) and name != "reference":
            raise TypeError(f"{argument}: {x.dtype} on {x.device}, expected bfloat16 or float16; "
                            'convert it, run under torch.autocast, or pass backend="reference"')
        name = name or f"cuda:{x.device.index}" + (":f16" if x.dtype is torch.float16 else "")
    elif x.device.type != "cpu":
        raise NotImplementedError(f"{argument}: on {x.device}, expected a CPU or CUDA tensor")
    elif not name:
        name = "reference" if x.dtype is torch.float64 else "cpu"
    return _open(name, torch.get_num_threads(), x.dtype, os.getpid())


def available() -> list[str]:
    """The names that ``backend`` takes on this machine, slowest first."""
    return _native.available()
