# SPDX-License-Identifier: Apache-2.0
"""What a record says of where it comes from."""

import datetime
import os
import pathlib
import subprocess

import torch


def _said(*command: str) -> str:
    """What a program prints; nothing where it fails or is missing."""
    here = pathlib.Path(__file__).parent
    try:
        return subprocess.run(command, cwd=here, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def fields() -> dict:
    """device, driver (of a GPU), commit (INFLLM_COMMIT names it in a copy without .git), date."""
    cuda = torch.cuda.is_available()
    named = {"device": torch.cuda.get_device_name() if cuda else "cpu"}
    if cuda:
        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        named["driver"] = driver.partition("\n")[0]
    named["commit"] = os.environ.get("INFLLM_COMMIT") or _said("git", "rev-parse", "--short", "HEAD")
    return {**named, "date": datetime.date.today().isoformat()}
