# SPDX-License-Identifier: Apache-2.0
"""What several processes compute, against one: context parallelism, DDP, FSDP2. A JSON line a check.

    torchrun --nproc-per-node 4 python/tests/scale.py                  # NCCL, one GPU a process
    torchrun --nproc-per-node 2 python/tests/scale.py --backend gloo   # CPU
    torchrun --nproc-per-node 4 python/tests/scale.py --backend gloo --device cuda

The last takes fewer GPUs than processes too, which NCCL refuses; nothing is timed then, and what
gloo cannot do with a GPU's memory goes through the host's.

Every process also computes the whole alone and compares its part of it: relative L2 norms of the
difference. The bound is that of the roundings in which the two differ: results and gradients of W
parts are rounded to the type of the tensors before they are added, and sums of n terms in float are
taken in another order: n roundings of either sign, sqrt(n) u. Exits with 1 if a bound is broken.
"""

import argparse
import datetime
import json
import math
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import infllm
from infllm import context_parallel

SPARSE = infllm.SparseConfig(window_size=128, topk=6, dense_len=512)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def bound(dtype, world, terms, roundings=2):
    unit, single = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    return (world + roundings) * unit + math.sqrt(terms) * single


def lengths_of(tokens):
    """Sequences that begin and end anywhere: one over most of it, short and empty ones beside."""
    cuts = [0, tokens // 8 + 5, tokens // 8 + 5, tokens // 8 + 40, tokens - tokens // 16 - 7, tokens]
    return cuts


class Setting:
    def __init__(self, args):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.cuda, self.timed = args.device == "cuda", args.backend == "nccl"
        self.through_host = self.cuda and args.backend == "gloo"
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else "cpu"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.worst = 0.0

    def report(self, name, error, limit, **more):
        """The largest error of all processes, against the bound."""
        error = torch.tensor(error, device=self.device)
        dist.all_reduce(error, op=dist.ReduceOp.MAX)
        self.worst = max(self.worst, float(error) / limit)
        if self.rank == 0:
            device = torch.cuda.get_device_name() if self.cuda else "cpu"
            if self.cuda:
                more["gpus"] = min(self.world, torch.cuda.device_count())
            record = {"name": f"scale.{name}", "processes": self.world, "device": device,
                      "date": datetime.date.today().isoformat(), **more,
                      "error": float(f"{float(error):.3g}"), "bound": float(f"{limit:.3g}")}  # fmt: skip
            print(json.dumps(record), flush=True)


class HostGather:
    """FSDP2's all-gather by way of the host."""

    def allocate(self, size, *, dtype, device):
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        whole = torch.empty(output_tensor.shape, dtype=output_tensor.dtype)
        dist.all_gather_into_tensor(whole, input_tensor.cpu(), group=group)
        output_tensor.copy_(whole)


class HostScatter(HostGather):
    """Its reduce-scatter; gloo adds up, but takes no means."""

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        part = torch.empty(output_tensor.shape, dtype=output_tensor.dtype)
        dist.reduce_scatter_tensor(part, input_tensor.cpu(), group=group)
        output_tensor.copy_(part / (dist.get_world_size(group) if op == dist.ReduceOp.AVG else 1))


def go_through_the_host():
    """Context parallelism's collectives likewise."""
    for name in ("_all_gather", "_reduce_scatter"):
        def collective(x, *args, direct=getattr(context_parallel, name)):
            return funcol.wait_tensor(direct(x.cpu(), *args)).to(x.device)
        setattr(context_parallel, name, collective)


def inputs(setting, tokens, heads, kv_heads, dim, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim), (tokens, heads, dim))
    return [torch.randn(s, generator=generator).to(setting.device, setting.dtype) for s in shapes]


def milliseconds(setting, run, times=3):
    """Median time of run() between CUDA events."""
    taken = []
    for _ in range(times + 1):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end))
    return round(sorted(taken[1:])[times // 2], 3)


def check_context_parallel(setting, cu, heads, kv_heads, dim, config, compiled=False, timed=False):
    q, k, v, grad = inputs(setting, cu[-1], heads, kv_heads, dim)
    plan = context_parallel.plan(cu, sparse_config=config, device=setting.device)
    whole = infllm.make_plan(
        torch.tensor(cu, dtype=torch.int32, device=setting.device), None,
        *[max(b - a for a, b in zip(cu, cu[1:]))] * 2, sparse_config=config,
    )  # fmt: skip
    alone = [x.clone().requires_grad_() for x in (q, k, v)]
    mine = [context_parallel.shard(x).clone().requires_grad_() for x in (q, k, v)]

    def spread(q, k, v):
        return context_parallel.attention(q, k, v, plan, sparse_config=config)

    if compiled:
        spread = torch.compile(spread, backend="aot_eager", fullgraph=True)
    expected = infllm.attention(*alone, plan=whole, sparse_config=config)
    expected.backward(grad)
    out = spread(*mine)
    out.backward(context_parallel.shard(grad))
    errors = [relative(out.detach(), context_parallel.shard(expected.detach()))]
    errors += [relative(a.grad, context_parallel.shard(b.grad)) for a, b in zip(mine, alone)]
    more = {}
    if timed:
        def step(inputs, run, grad):
            return lambda: torch.autograd.grad(run(*inputs), inputs, grad)

        one = step(alone, lambda q, k, v: infllm.attention(q, k, v, plan=whole, sparse_config=config), grad)
        more = {"ms": milliseconds(setting, step(mine, spread, context_parallel.shard(grad))),
                "ms_one": milliseconds(setting, one)}  # fmt: skip
    setting.report(
        "context_parallel" + (".compiled" if compiled else ""), max(errors),
        bound(setting.dtype, setting.world, cu[-1] * heads // kv_heads),
        tokens=cu[-1], heads_q=heads, heads_kv=kv_heads, head_dim=dim,
        attention="dense" if config is None else "sparse", **more,
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, hidden, kv):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, hidden + 2 * kv), nn.Linear(hidden, hidden)
        self.sizes = [hidden, kv, kv]

    def forward(self, x):
        parts = self.qkv(self.norm(x)).split(self.sizes, -1)
        q, k, v = (p.unflatten(-1, (-1, 64)) for p in parts)
        return x + self.out(infllm.attention(q, k, v, sparse_config=SPARSE).flatten(-2))


class Model(nn.Module):
    def __init__(self, hidden=256, kv=64, layers=2, vocabulary=64):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Block(hidden, kv) for _ in range(layers))
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens):
        x = self.embed(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), tokens[:, 1:].flatten())


def check_data_parallel(setting, kind):
    """One step of SGD on W sequences, spread over W processes and alone."""
    torch.manual_seed(1)
    alone, model = Model().to(setting.device), Model().to(setting.device)
    model.load_state_dict(alone.state_dict())
    tokens = torch.randint(64, (setting.world, 769), generator=torch.Generator().manual_seed(2))
    tokens = tokens.to(setting.device)

    def run(net, batch):
        with torch.autocast("cuda", torch.bfloat16, enabled=setting.cuda):
            loss = net(batch)
        loss.backward()
        return float(loss.detach())

    run(alone, tokens)
    if kind == "fsdp2":
        for layer in model.layers:
            fully_shard(layer)
        spread = fully_shard(model)
        for module in (*model.layers, model) if setting.through_host else ():
            module.set_custom_all_gather(HostGather())
            module.set_custom_reduce_scatter(HostScatter())
    else:
        ids = [setting.device.index] if setting.cuda else None
        spread = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    run(spread, tokens[setting.rank : setting.rank + 1])
    errors = []
    for a, b in zip(model.parameters(), alone.parameters()):
        if kind == "fsdp2":  # every process has a part of the rows
            part, parts = a.grad.to_local(), b.grad.chunk(setting.world)
            errors += [relative(part, parts[setting.rank])] if part.numel() else []
        else:
            errors.append(relative(a.grad, b.grad))
    # Activations and their gradients are rounded about eight times a layer, forward and backward.
    limit = bound(setting.dtype, setting.world, tokens.numel(), roundings=2 * 8 * 2)
    setting.report(kind, max(errors), limit, parameters=sum(p.numel() for p in alone.parameters()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda with nccl")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if args.backend == "nccl" else "cpu")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(args.backend)
    setting = Setting(args)
    if setting.through_host:
        go_through_the_host()
    small = 16384 if setting.cuda else 768
    for config in (None, SPARSE):
        check_context_parallel(setting, lengths_of(small), 8, 1, 64, config)
    check_context_parallel(setting, lengths_of(small), 8, 1, 64, SPARSE, compiled=True)
    for kind in ("ddp", "fsdp2"):
        check_data_parallel(setting, kind)
    if setting.cuda:
        for tokens, config in ((32768, None), (131072, infllm.SparseConfig())):
            check_context_parallel(setting, [0, tokens], 32, 2, 128, config, timed=setting.timed)
    worst = setting.worst
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(worst > 1)


if __name__ == "__main__":
    main()
