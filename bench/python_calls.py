#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times what a call of the Python package costs the host, beside PyTorch's own attention.

    PYTHONPATH=build/release/python bench/python_calls.py --output bench/results/calls/h200.jsonl

64 tokens, so that the device has next to nothing to do; the median over calls that begin with an idle
device and are not waited for. On a CPU the calls compute too, and the times are of that.
"""

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import time

import infllm
import torch
from torch.nn.functional import scaled_dot_product_attention

TOKENS, WARM, CALLS = 64, 20, 60


def microseconds(call):
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(WARM):
        call()
    times = []
    for _ in range(CALLS):
        wait()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[CALLS // 2] * 1e6


def measurements(device):
    """(call, gradients, microseconds) of every way to call."""
    kind = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    q, k, v = (torch.randn(TOKENS, heads, 64, **kind) for heads in (4, 2, 2))
    config = infllm.SparseConfig(window_size=64, topk=3, dense_len=0)
    starts = torch.tensor([0, TOKENS], dtype=torch.int32, device=device)

    def plan(sparse_config=None):
        return infllm.make_plan(starts, None, TOKENS, TOKENS, sparse_config=sparse_config)

    dense, sparse = plan(), plan(config)
    # PyTorch's takes [B, H, T, D].
    theirs = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
    calls = {
        "`attention`, dense": ((q, k, v), lambda *x: infllm.attention(*x, plan=dense)),
        "`attention`, sparse": (
            (q, k, v), lambda *x: infllm.attention(*x, plan=sparse, sparse_config=config)),
        "`attention`, dense, without a plan": ((q, k, v), infllm.attention),
        "PyTorch's `scaled_dot_product_attention`": (
            theirs, lambda *x: scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)),
    }
    for name, (inputs, call) in calls.items():
        with torch.no_grad():
            yield name, "none", microseconds(lambda: call(*inputs))
        wanted = [x.detach().requires_grad_() for x in inputs]
        yield name, "kept", microseconds(lambda: call(*wanted))
        grad = torch.randn_like(inputs[0])
        yield name, "taken", microseconds(lambda: torch.autograd.grad(call(*wanted), wanted, grad))

    yield "`make_plan`", "none", microseconds(lambda: plan(config))
    with torch.no_grad():
        yield "`choose`", "none", microseconds(
            lambda: infllm.choose(q, k, plan=sparse, sparse_config=config))
        cache = infllm.KVCache(8, 2, 64, sparse_config=config, **kind)
        step = [x[None, :1] for x in (q, k, v)]
        lengths = torch.tensor([TOKENS], dtype=torch.int32, device=device)
        table = torch.arange(8, dtype=torch.int32, device=device)[None]
        yield "`attend_with_kvcache`, one token", "none", microseconds(
            lambda: infllm.attend_with_kvcache(step[0], cache, step[1], step[2],
                                               cache_seqlens=lengths, page_table=table))


def commit():
    named = os.environ.get("INFLLM_COMMIT")
    return named or subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=pathlib.Path(__file__).parent, check=True,
        capture_output=True, text=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="append JSON lines here")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "commit": commit(),
             "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")}
    output.parent.mkdir(parents=True, exist_ok=True)
    for call, gradients, us in measurements(device):
        record = {"name": "python.call", "call": call, "gradients": gradients, "us": round(us, 1), **about}
        print(f"{us:8.1f} us  {call}, {gradients}", flush=True)
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
