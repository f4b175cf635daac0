# SPDX-License-Identifier: Apache-2.0
"""Trains: short and dense first, then, from those weights, longer in one of three ways.

    torchrun --nproc-per-node 4 examples/adapt/train.py --config C --phase pretrain --out A
    python3 examples/adapt/train.py --config C --phase adapt --arm dense   --init A/model --out B
    python3 examples/adapt/train.py --config C --phase adapt --arm sparse  --init A/model --out C
    python3 examples/adapt/train.py --config C --phase adapt --arm aligned --init A/model --out D

A step's samples follow from (seed, rank, step). The run ends after its steps or at its time limit,
whichever comes first; the learning rate falls with whichever of the two is nearer. Pretraining that
is too slow for its limit shortens all its stages alike. Interrupted, a run goes on from OUT/state.pt.
OUT/log.jsonl has the losses, OUT/model the checkpoint.

    loss = cross-entropy of the answers + text_weight x cross-entropy of everything else
           + selection-alignment loss (arm aligned)

where every document's answers weigh the same, be they three words or forty answers of five digits.
"""

import argparse
import datetime
import itertools
import json
import os
import pathlib
import sys
import time

import attending
import checkpoint
import documents
import network
import numpy as np
import ruler
import settings as settings_lib
import torch
import torch.distributed as dist
from needle import optimizer as optimizer_lib
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

ARMS = ("dense", "sparse", "aligned")
AGREE_EVERY = 10  # steps between two looks at the clock that all processes share
JUDGED = 60  # steps after which it is judged whether all of them fit into the time
LATER = 1.2  # the steps ahead, of longer samples, take so many times as long as those


class Batches(torch.utils.data.IterableDataset):
    """Batches in step order; worker w makes steps w, w + workers, ...

    stretch: a shared number; so many times the phase's steps are made.
    """

    def __init__(self, settings, phase, args, rank, first):
        self.settings, self.phase, self.args = settings, phase, args
        self.rank, self.first = rank, first
        self.stretch = torch.ones(1, dtype=torch.float64).share_memory_()

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        maker = documents.Maker(self.args.tokenizer, documents.Filler(self.args.data, "train"))
        for step in itertools.count(self.first + worker, workers):
            phase = self.phase.stretched(float(self.stretch))
            if step >= phase.steps:
                return
            length = phase.length(step, self.args.seed)
            rng = np.random.default_rng([self.args.seed, self.rank + 1, step])
            count = max(1, self.settings.tokens_per_step // length)
            made = [maker.training(rng, length) for _ in range(count)]
            yield (
                step,
                torch.from_numpy(np.stack([s.tokens for s in made])),
                torch.from_numpy(np.stack([s.kinds for s in made])),
            )


def taught_rows(length: int, total: int, rows: int, generator) -> torch.Tensor:
    """int32, ascending: as many rows of each sequence, half of them its last, half anywhere."""
    each = min(length, max(2, rows * length // total))
    last = length - each // 2
    parts = []
    for begin in range(0, total, length):
        others = torch.randperm(last, generator=generator)[: each - each // 2].sort().values
        parts += [begin + others, torch.arange(begin + last, begin + length)]
    return torch.cat(parts).to(torch.int32)


def draw_lesson(align: dict, config, length: int, total: int, generator) -> dict:
    """What a step of the arm `aligned` teaches: some layers, drawn anew each time, by some rows."""
    order = torch.randperm(config.num_hidden_layers, generator=generator)
    rows = taught_rows(length, total, align["rows"], generator)
    return {"taught": tuple(order[: align["layers"]].tolist()), "rows": rows,
            "config": config.sparse}  # fmt: skip


def mean_where(values, mask):
    return (values * mask).sum() / mask.sum().clamp(min=1)


def step_losses(net, tokens, kinds, attend, rope, weights):
    """The loss of one batch [B, length + 1], its parts for the log, and tallies [2, tasks]."""
    losses, best = net(tokens[:, :-1].flatten(), tokens[:, 1:].flatten(), *rope, attend)
    kind = kinds[:, 1:]
    losses, hits = losses.view(kind.shape), best.view(kind.shape) == tokens[:, 1:]
    answer, rest = kind >= documents.ANSWER, kind == documents.REST
    each = (losses * answer).sum(1) / answer.sum(1).clamp(min=1)  # of every document
    parts = {
        "answer_loss": mean_where(each, answer.any(1)),
        "text_loss": mean_where(losses, rest),
    }
    total = parts["answer_loss"] + weights["text"] * parts["text_loss"]
    if attend.losses:
        parts["align_loss"] = torch.stack(attend.losses).mean()
        total = total + weights["align"] * parts["align_loss"]
    with torch.no_grad():
        task = (kind - documents.ANSWER).clamp(min=0).flatten()
        tally = torch.stack([(hits & answer).flatten(), answer.flatten()]).float()
        tally = tally.new_zeros(2, len(ruler.TASKS)).index_add_(1, task, tally)
    return total, {name: value.detach() for name, value in parts.items()}, tally


def fitting(steps: int, done: int, seconds: float, left: float) -> float:
    """By what to multiply `steps` so that those ahead fit into the seconds left; at most 1.

    seconds: of each of the first steps, `done` in number
    """
    ahead = LATER * (steps - done) * seconds
    return 1.0 if ahead <= left else (done + max(0.0, left) / ahead * (steps - done)) / steps


class Optimizers:
    """Muon for the matrices, AdamW for the rest; the schedule scales both."""

    def __init__(self, net, numbers):
        recipe = argparse.Namespace(
            muon_rate=numbers["muon_rate"], adamw_rate=numbers["adamw_rate"]
        )
        self.parts = optimizer_lib.build(net, "muon", recipe)

    def step(self, share: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["base_lr"] * share
            part.step()
            part.zero_grad(set_to_none=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    settings_lib.add_paths(parser)
    parser.add_argument("--config", default=settings_lib.HERE / "configs/h200.toml")
    parser.add_argument("--phase", choices=("pretrain", "adapt"), required=True)
    parser.add_argument("--arm", choices=ARMS, default="dense")
    parser.add_argument("--init", type=pathlib.Path, help="checkpoint to start from")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stretch", type=float, default=1, help="so many times the steps")
    parser.add_argument("--deadline", type=float, help="end at this Unix time at the latest")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=float, default=600, help="seconds")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    began = time.time()

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    settings = settings_lib.load(args.config)
    phase = settings.phases[args.phase].stretched(args.stretch)
    torch.manual_seed(args.seed)
    net = network.Network(checkpoint.config_of(settings))
    if args.init:
        checkpoint.read(net, args.init)
    net = net.to(device)
    optimizers = Optimizers(net, settings.optimizer)
    args.out.mkdir(parents=True, exist_ok=True)
    state_file, first, tokens_seen, before = args.out / "state.pt", 0, 0, 0.0
    if state_file.exists():
        state = checkpoint.load_state(state_file, net, optimizers.parts, device)
        first, tokens_seen, before = state["step"], state["tokens"], state["seconds"]
    if cuda and not args.no_compile:
        net.compile()
    wrapped = net
    if world > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(
            net, device_ids=[device.index] if cuda else None, gradient_as_bucket_view=True
        )
        if cuda:  # half the bytes, where GPUs may have nothing but the host's memory between them
            wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
    parameters = list(net.parameters())
    batches = Batches(settings, phase, args, rank, first)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=args.workers,
        prefetch_factor=4 if args.workers else None, pin_memory=cuda,
    )  # fmt: skip
    sparse = net.config.sparse if args.arm != "dense" and args.phase == "adapt" else None
    generator = torch.Generator().manual_seed(args.seed)
    ropes = {}
    log = open(args.out / "log.jsonl", "a", encoding="utf-8") if rank == 0 else None
    limit = min(phase.seconds, args.deadline - began if args.deadline else float("inf"))
    started, last_save, step, judged = time.time(), time.time(), first - 1, False
    waited, starved = 0.0, 0.0  # for batches: this process, and the one that waited longest
    tally = torch.zeros(2, len(ruler.TASKS), device=device)  # since the last line of the log
    spent, asked = 0.0, time.time()  # spent: share of the time limit, agreed by all processes
    for step, tokens, kinds in loader:
        waited += time.time() - asked
        tokens, kinds = (x.to(device, non_blocking=True) for x in (tokens, kinds))
        count, length = tokens.shape[0], tokens.shape[1] - 1
        if length not in ropes:
            positions = torch.arange(length, device=device).repeat(count)
            ropes[length] = network.rope_table(positions, net.config)
        lesson = {}
        if args.arm == "aligned" and args.phase == "adapt":
            lesson = draw_lesson(settings.align, net.config, length, count * length, generator)
        attend = attending.Attend(count * length, length, device, sparse, **lesson)
        loss, parts, counted = step_losses(
            wrapped, tokens, kinds, attend, ropes[length], settings.optimizer
        )
        tally = tally + counted
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        share = phase.share(step, max((step + 1) / phase.steps, spent))
        optimizers.step(share)
        tokens_seen += count * length * world
        if step == first:
            started = time.time()  # the first step compiles
        if rank == 0 and (step % args.log_every == 0 or step + 1 == phase.steps):
            right, asked_for = tally.tolist()
            tally.zero_()
            record = {
                "phase": args.phase, "arm": args.arm, "seed": args.seed, "step": step,
                "length": length, "tokens": tokens_seen,
                **{name: round(float(value), 4) for name, value in parts.items()},
                "answer_tokens_right": round(sum(right) / max(1, sum(asked_for)), 4),
                "right": {task: round(good / all_, 3)
                          for task, good, all_ in zip(ruler.TASKS, right, asked_for) if all_},
                "gradient": round(float(norm), 3), "rate": round(share, 4),
                "waited": round(starved, 2), "seconds": round(before + time.time() - began, 1),
            }  # fmt: skip
            print(json.dumps(record), file=log, flush=True)
            print(
                f"\r{args.phase} {args.arm} {step + 1}/{phase.steps} at {length}: answers "
                f"{record['answer_loss']:.3f} text {record['text_loss']:.3f} right "
                f"{record['answer_tokens_right']:.3f}, {tokens_seen / 1e6:.1f} M tokens, "
                f"{record['seconds']:.0f} s",
                end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True,
            )  # fmt: skip
            starved = 0.0
        if step % AGREE_EVERY == AGREE_EVERY - 1:
            run_time = time.time() - started
            shared = torch.tensor([run_time / max(1e-9, limit - (started - began)), waited, run_time])
            if world > 1:
                shared = shared.to(device)
                dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            spent, longest_wait, run_time = shared.tolist()
            starved, waited = starved + longest_wait, 0.0
            if args.phase == "pretrain" and step - first >= JUDGED and not judged:
                judged = True
                left = run_time / spent - run_time
                batches.stretch.fill_(
                    fitting(phase.steps, step + 1, run_time / (step - first), left)
                )
                phase = phase.stretched(float(batches.stretch))
                if rank == 0:
                    print(f"{phase.steps} steps will be made", file=sys.stderr, flush=True)
            if rank == 0 and time.time() - last_save > args.save_every:
                progress = {"step": step + 1, "tokens": tokens_seen}
                progress["seconds"] = before + time.time() - began
                checkpoint.save_state(state_file, net, optimizers.parts, **progress)
                last_save = time.time()
            if spent >= 1:
                break
        if step + 1 >= phase.steps:
            break
        asked = time.time()
    if rank == 0:
        seconds = before + time.time() - began
        checkpoint.write(net, args.out / "model", args.tokenizer)
        checkpoint.save_state(
            state_file, net, optimizers.parts, step=step + 1, tokens=tokens_seen, seconds=seconds
        )
        record = {
            "name": "adapt.run", "model": settings.name, "phase": args.phase, "arm": args.arm,
            "seed": args.seed, "steps": step + 1, "tokens": tokens_seen,
            "seconds": round(seconds, 1), "processes": world,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        (args.out / "run.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        print(f"\n{args.phase} {args.arm}: {step + 1} steps, {tokens_seen / 1e6:.1f} M tokens, "
              f"{seconds:.0f} s, {world} processes", file=sys.stderr, flush=True)  # fmt: skip
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0) if cuda else None  # loader workers that are still making samples


if __name__ == "__main__":
    main()
