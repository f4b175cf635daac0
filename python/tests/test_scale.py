# SPDX-License-Identifier: Apache-2.0
"""Two processes on the CPU against one (scale.py), and the shares that a plan gives."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import infllm
from infllm import context_parallel


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_compute_what_one_does() -> None:
    folders = [str(pathlib.Path(infllm.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    world = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
             "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
    program = [sys.executable, str(pathlib.Path(__file__).parent / "scale.py"), "--backend", "gloo"]
    processes = [
        subprocess.Popen(program, env={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "".join(map(str, outputs))
    records = [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]
    assert {r["name"] for r in records} == {
        "scale.context_parallel", "scale.context_parallel.compiled", "scale.ddp", "scale.fsdp2"}
    assert all(r["error"] <= r["bound"] and r["processes"] == 2 for r in records)


@pytest.fixture
def alone(tmp_path: pathlib.Path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_shares_cover_every_query_once(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds, world = [0, 5, 5, 130, 512], 4
    config = infllm.SparseConfig(window_size=64, topk=2, dense_len=300)
    monkeypatch.setattr(dist, "get_world_size", lambda group: world)
    seen = []
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        plan = context_parallel.plan(bounds, sparse_config=config)
        queries, keys = plan.local.cu_seqlens_q.tolist(), plan.local.cu_seqlens_k.tolist()
        assert queries[-1] == plan.tokens == 128 and keys[-1] == plan.end - plan.first_key
        for i, (a, b) in enumerate(zip(queries, queries[1:])):
            # Right-aligned: the last query of a sequence's share is its last key's own.
            assert plan.begin + b == plan.first_key + keys[i + 1]
            sequence = next(s for s in range(4) if bounds[s] <= plan.begin + a < bounds[s + 1])
            assert plan.first_key + keys[i] == bounds[sequence]
            flags = plan.local.sparse
            assert (flags is not None and bool(flags[i])) == (sequence == 3)  # of 382 tokens
            seen += range(plan.begin + a, plan.begin + b)
    assert seen == list(range(512))


def test_refusals(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 1, 64)
    plan = context_parallel.plan([0, 7])
    with pytest.raises(ValueError, match="k: 6 tokens, expected 7"):
        context_parallel.attention(x, x[:6], x, plan)
    with pytest.raises(TypeError, match="plan: .*infllm.plan.Plan.*, expected what context_parallel"):
        context_parallel.attention(x, x, x, plan.local)
    with pytest.raises(TypeError, match="plan: .*context_parallel.Plan.*, expected what infllm.make"):
        infllm.attention(x, x, x, plan=plan)
    with pytest.raises(ValueError, match="k_score"):
        context_parallel.attention(x, x, x, plan, q_score=x, k_score=x)
    with pytest.raises(ValueError, match="expected 0 = c0"):
        context_parallel.plan([0, 5, 3])
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    with pytest.raises(ValueError, match="pad the batch to 8"):
        context_parallel.plan([0, 7])
    with pytest.raises(ValueError, match="size 7 over 4"):
        context_parallel.shard(x)
