# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/python.md run, do what they say, and are what the page shows."""

from __future__ import annotations

import pathlib
import re
import runpy

import pytest
import torch

import infllm

ROOT = pathlib.Path(__file__).parents[2]


def test_train_step_learns() -> None:
    losses = runpy.run_path(str(ROOT / "examples" / "train_step.py"))["main"]()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_decode_step_is_one_pass() -> None:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    error = runpy.run_path(str(ROOT / "examples" / "decode_step.py"))["main"]()
    assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["train_step", "decode_step"])
def test_the_page_shows_the_program(name: str) -> None:
    """Every line of the page's example stands in the program."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    example = page.split(f"<!-- examples/{name}.py -->\n```python\n")[1].split("```")[0]
    program = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    program_lines = {line.strip() for line in program.splitlines()}
    for line in example.splitlines():
        assert line.strip() in program_lines | {"import torch", "import infllm", ""}, line


def test_the_package_has_the_projects_version() -> None:
    project = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert f"project(infllm VERSION {infllm.__version__} " in project
    assert re.fullmatch(r"\d+\.\d+\.\d+", infllm.__version__)
