# SPDX-License-Identifier: Apache-2.0
"""The example of docs/python.md runs, learns, and is what the page shows."""

from __future__ import annotations

import pathlib
import re
import runpy

import infllm

ROOT = pathlib.Path(__file__).parents[2]


def test_train_step_learns() -> None:
    losses = runpy.run_path(str(ROOT / "examples" / "train_step.py"))["main"]()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_the_page_shows_the_program() -> None:
    """Every line of the page's training example stands in the program."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    example = page.split("<!-- examples/train_step.py -->\n```python\n")[1].split("```")[0]
    program = (ROOT / "examples" / "train_step.py").read_text(encoding="utf-8")
    program_lines = {line.strip() for line in program.splitlines()}
    for line in example.splitlines():
        assert line.strip() in program_lines | {"import torch", "import infllm", ""}, line


def test_the_package_has_the_projects_version() -> None:
    project = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert f"project(infllm VERSION {infllm.__version__} " in project
    assert re.fullmatch(r"\d+\.\d+\.\d+", infllm.__version__)
