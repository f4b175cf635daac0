# SPDX-License-Identifier: Apache-2.0
"""Trains: short and dense first, then, from those weights, longer in one of four ways.

    torchrun --nproc-per-node 4 examples/adapt/train.py --config C --phase pretrain --out A
    python3 examples/adapt/train.py --config C --phase adapt --arm dense   --init A/model --out B
    python3 examples/adapt/train.py --config C --phase adapt --arm sparse  --init A/model --out C
    python3 examples/adapt/train.py --config C --phase adapt --arm aligned --init A/model --out D
    python3 examples/adapt/train.py --config C --phase adapt --arm taught  --init A/model --out E

A step's samples follow from (seed, rank, step). The run ends after its steps or at its time limit,
whichever comes first; the learning rate falls with whichever of the two is nearer. Pretraining that
is too slow for its limit shortens all its stages alike. Interrupted, or paused at a given time, a run
goes on from OUT/state.pt. OUT/log.jsonl has the losses, OUT/model the checkpoint.

    loss = cross-entropy of the answers + text_weight x cross-entropy of everything else
           + selection-alignment loss (arms aligned and taught)

where every document's answers weigh the same, be they three words or forty answers of five digits.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
import time

import attending
import checkpoint
import documents
import network
import numpy as np
import origin
import ruler
import settings as settings_lib
import torch
import torch.distributed as dist
import torch.nn.functional as F
from needle import optimizer as optimizer_lib
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

AGREE_EVERY = 10  # steps between two looks at the clock that all processes share
JUDGED = 60  # steps after which it is judged whether all of them fit into the time
ASKING = 48  # tokens that a question and the beginning of its answer take
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


def taught_rows(kinds: torch.Tensor, count: int, generator) -> torch.Tensor:
    """int32 [count], ascending, of the rows of a batch with kinds [B, length + 1], on the host.

    Half of the draws are for rows that say an answer, a quarter for rows of the questions and what is
    behind them, a quarter for any. Few rows look something up, and a wrong selection costs most there:
    in the first turn as much as in the last, which alone has the others in sight.
    """
    says = (kinds[:, 1:] >= documents.ANSWER).float()
    turns = (F.pad(says[:, ASKING:], (0, ASKING)).cumsum(1) > 0).float()
    parts = ((0.5, says), (0.25, turns), (0.25, torch.ones_like(says)))
    weights = sum(share / rows.sum().clamp(min=1) * rows for share, rows in parts)
    return torch.multinomial(weights.flatten(), count, generator=generator).sort().values.int()


def draw_lesson(align: dict, config, kinds: torch.Tensor, generator) -> dict:
    """What a step of an arm that is taught teaches: some layers, drawn anew each time, by some rows."""
    order = torch.randperm(config.num_hidden_layers, generator=generator)
    rows = taught_rows(kinds, align["rows"], generator)
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
            part.zero_grad()


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; alone without it."""

    rank: int
    world: int
    device: torch.device

    @staticmethod
    def join() -> "Processes":
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if world > 1:
            cuda = device.type == "cuda"
            dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        return Processes(rank, world, device)

    def wrap(self, net):
        if self.world == 1:
            return net
        cuda = self.device.type == "cuda"
        torch._dynamo.config.optimize_ddp = False  # what is compiled is part of a layer: nothing to cut
        wrapped = torch.nn.parallel.DistributedDataParallel(
            net, device_ids=[self.device.index] if cuda else None, gradient_as_bucket_view=True
        )
        if cuda:  # half the bytes, where GPUs may have nothing but the host's memory between them
            wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
        return wrapped

    def most(self, *values: float) -> list:
        """The largest of each number over all processes."""
        if self.world == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.tolist()


class Run:
    """A run's model, optimizers, clock and log, on each of its processes."""

    def __init__(self, args, processes: Processes):
        self.args, self.processes, self.began = args, processes, time.time()
        self.settings = settings_lib.load(args.config)
        self.phase = self.settings.phases[args.phase].stretched(args.stretch)
        self.arm = args.arm if args.phase == "adapt" else "dense"
        self.cuda = processes.device.type == "cuda"
        torch.manual_seed(args.seed)
        net = network.Network(checkpoint.config_of(self.settings))
        if args.init:
            checkpoint.read(net, args.init)
        self.net = net.to(processes.device)
        self.optimizers = Optimizers(self.net, self.settings.optimizer)
        args.out.mkdir(parents=True, exist_ok=True)
        self.state_file = args.out / "state.pt"
        self.steps = self.first = self.tokens = 0  # steps made, before this start, and their tokens
        self.before = 0.0  # seconds, before this start
        if self.state_file.exists():
            state = checkpoint.load_state(
                self.state_file, self.net, self.optimizers.parts, processes.device
            )
            self.steps = self.first = state["step"]
            self.tokens, self.before = state["tokens"], state["seconds"]
        if self.cuda and not args.no_compile:
            self.net.compile(self.settings.tokens_per_step)
        self.wrapped = processes.wrap(self.net)
        self.batches = Batches(self.settings, self.phase, args, processes.rank, self.first)
        self.ropes = {}
        self.tally = torch.zeros(2, len(ruler.TASKS), device=processes.device)  # since the last line
        self.log = args.out / "log.jsonl"
        self.started = self.saved = time.time()
        self.spent = 0.0  # share of the time limit, agreed by all processes
        self.waited = self.starved = 0.0  # for batches: this process; the one that waited longest
        self.judged = args.phase != "pretrain"

    @property
    def seconds(self) -> float:
        return self.before + time.time() - self.began

    def say(self, text: str, end="\n") -> None:
        if self.processes.rank == 0:
            print(text, end=end, file=sys.stderr, flush=True)

    def step(self, tokens, kinds) -> None:
        """Forward, backward and update by one batch [B, length + 1]; nothing here waits for the GPU."""
        count, length = tokens.shape[0], tokens.shape[1] - 1
        total, device = count * length, self.processes.device
        if length not in self.ropes:
            positions = torch.arange(length, device=device).repeat(count)
            self.ropes[length] = network.rope_table(positions, self.net.config)
        lesson = {}
        if attending.ARMS[self.arm].taught:
            generator = torch.Generator().manual_seed(self.args.seed << 32 | self.steps)
            lesson = draw_lesson(self.settings.align, self.net.config, kinds, generator)
        sparse = self.net.config.sparse if attending.ARMS[self.arm].sparse else None
        attend = attending.Attend(total, length, device, sparse, **lesson)
        tokens, kinds = (x.to(device, non_blocking=True) for x in (tokens, kinds))
        loss, self.parts, counted = step_losses(
            self.wrapped, tokens, kinds, attend, self.ropes[length], self.settings.optimizer
        )
        self.tally += counted
        loss.backward()
        self.norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.share = self.phase.share(
            self.steps, max((self.steps + 1) / self.phase.steps, self.spent)
        )
        self.optimizers.step(self.share)
        self.length, self.steps = length, self.steps + 1
        self.tokens += total * self.processes.world
        if self.steps == self.first + 1:
            self.started = time.time()  # the first step compiles

    def report(self) -> None:
        right, asked_for = self.tally.tolist()
        self.tally.zero_()
        record = {
            "phase": self.args.phase, "arm": self.arm, "seed": self.args.seed,
            "step": self.steps - 1, "length": self.length, "tokens": self.tokens,
            **{name: round(float(value), 4) for name, value in self.parts.items()},
            "answer_tokens_right": round(sum(right) / max(1, sum(asked_for)), 4),
            "right": {task: round(good / all_, 3)
                      for task, good, all_ in zip(ruler.TASKS, right, asked_for) if all_},
            "gradient": round(float(self.norm), 3), "rate": round(self.share, 4),
            "waited": round(self.starved, 2), "seconds": round(self.seconds, 1),
        }  # fmt: skip
        self.starved = 0.0
        with self.log.open("a", encoding="utf-8") as log:
            print(json.dumps(record), file=log)
        self.say(
            f"\r{self.args.phase} {self.arm} {self.steps}/{self.phase.steps} at {self.length}: answers "
            f"{record['answer_loss']:.3f} text {record['text_loss']:.3f} right "
            f"{record['answer_tokens_right']:.3f}, {self.tokens / 1e6:.1f} M tokens, "
            f"{record['seconds']:.0f} s",
            end="" if sys.stderr.isatty() else "\n",
        )

    def agree(self) -> bool:
        """Looks at the clock that all processes share; whether the run goes on."""
        now = time.time()
        run_time = now - self.started
        limit = min(self.phase.seconds, self.args.deadline - self.began) - (self.started - self.began)
        self.spent, longest_wait, run_time, late = self.processes.most(
            run_time / max(1e-9, limit), self.waited, run_time, now - self.args.pause_at
        )
        self.starved, self.waited = self.starved + longest_wait, 0.0
        if self.steps - self.first > JUDGED and not self.judged:
            self.judged = True
            left = run_time / self.spent - run_time
            per_step = run_time / (self.steps - self.first - 1)
            factor = fitting(self.phase.steps, self.steps, per_step, left)
            self.batches.stretch.fill_(factor)
            self.phase = self.phase.stretched(factor)
            self.say(f"{self.phase.steps} steps will be made")
        if late >= 0 or now - self.saved > self.args.save_every:
            self.save()
        return self.spent < 1 and late < 0

    def save(self) -> None:
        if self.processes.rank == 0:
            checkpoint.save_state(
                self.state_file, self.net, self.optimizers.parts,
                step=self.steps, tokens=self.tokens, seconds=self.seconds,
            )  # fmt: skip
        self.saved = time.time()

    def train(self) -> bool:
        """Whether the run has come to its end."""
        workers = self.args.workers
        loader = torch.utils.data.DataLoader(
            self.batches, batch_size=None, num_workers=workers,
            prefetch_factor=4 if workers else None, pin_memory=self.cuda,
        )  # fmt: skip
        asked = time.time()
        for _, tokens, kinds in loader:
            self.waited += time.time() - asked
            self.step(tokens, kinds)
            over = self.steps >= self.phase.steps
            if self.processes.rank == 0 and ((self.steps - 1) % self.args.log_every == 0 or over):
                self.report()
            if self.steps % AGREE_EVERY == 0 and not over and not self.agree():
                break
            if over:
                break
            asked = time.time()
        paused = self.steps < self.phase.steps and self.spent < 1
        if paused:
            self.say(f"\n{self.args.phase} {self.arm}: paused after {self.steps} steps")
        elif self.processes.rank == 0:
            self.finish()
        return not paused

    def finish(self) -> None:
        checkpoint.write(self.net, self.args.out / "model", self.args.tokenizer)
        self.save()
        record = {
            "name": "adapt.run", "model": self.settings.name, "phase": self.args.phase,
            "arm": self.arm, "seed": self.args.seed, "steps": self.steps, "tokens": self.tokens,
            "seconds": round(self.seconds, 1), "processes": self.processes.world, **origin.fields(),
        }  # fmt: skip
        (self.args.out / "run.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        self.say(f"\n{self.args.phase} {self.arm}: {self.steps} steps, {self.tokens / 1e6:.1f} M tokens, "
                 f"{record['seconds']:.0f} s, {self.processes.world} processes")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    settings_lib.add_paths(parser)
    parser.add_argument("--config", default=settings_lib.HERE / "configs/h200.toml")
    parser.add_argument("--phase", choices=("pretrain", "adapt"), required=True)
    parser.add_argument("--arm", choices=attending.ARMS, default="dense")
    parser.add_argument("--init", type=pathlib.Path, help="checkpoint to start from")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stretch", type=float, default=1, help="so many times the steps")
    parser.add_argument("--deadline", type=float, default=math.inf, help="Unix time of the end")
    parser.add_argument("--pause-at", type=float, default=math.inf,
                        help="Unix time to save the state and stop, to be started again")  # fmt: skip
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=float, default=600, help="seconds")
    parser.add_argument("--no-compile", action="store_true")
    processes = Processes.join()
    finished = Run(parser.parse_args(), processes).train()
    if processes.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    status = 0 if finished else os.EX_TEMPFAIL
    if processes.device.type == "cuda":
        os._exit(status)  # loader workers that are still at it
    sys.exit(status or None)


if __name__ == "__main__":
    main()
