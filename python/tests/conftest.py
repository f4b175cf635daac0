# SPDX-License-Identifier: Apache-2.0
"""Tests marked ``cuda`` need a GPU: ``pytest -m cuda python/tests``. Others run on the CPU.

``--need-gpu`` refuses to go on without one instead of skipping them.
"""

from __future__ import annotations

import pytest
import torch

import infllm


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--need-gpu", action="store_true", help="fail where there is no GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found = any(name.startswith("cuda") for name in infllm.available())
    if not found and config.getoption("--need-gpu"):
        raise pytest.UsageError(f"found the devices {', '.join(infllm.available())}, expected one "
                                "that begins with cuda: a GPU and a build with CUDA columns")
    skip = pytest.mark.skip(reason="no CUDA device, or a build without CUDA columns")
    for item in items:
        if "cuda" in item.keywords and not found:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device in turn."""
    return request.param


def types_of(device: str) -> list[torch.dtype]:
    """The types that a device computes in itself."""
    return [torch.bfloat16, torch.float16] if device == "cuda" else [torch.float32, torch.bfloat16]


@pytest.fixture(params=["cpu-float32", "cpu-bfloat16",
                        pytest.param("cuda-bfloat16", marks=pytest.mark.cuda),
                        pytest.param("cuda-float16", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """Every device with every type of its own."""
    device, dtype = request.param.split("-")
    return device, getattr(torch, dtype)
