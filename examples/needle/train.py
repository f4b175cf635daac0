# SPDX-License-Identifier: Apache-2.0
"""Trains the model: short and dense first, then longer, dense and sparse in turn.

    torchrun --nproc-per-node 4 examples/needle/train.py --out .train/run      # one process a GPU
    python3 examples/needle/train.py --recipe smoke --out .train/smoke         # CPU, a minute

A step is wholly determined by (seed, rank, step): its length, attention, budget and samples. A run
ends after its recipe's steps or at --time-limit, and the rate falls with whichever is nearer;
a run that was cut goes on from --out/state.pt. The loss is

    cross-entropy of the answers + 0.3 x cross-entropy of everything else + alignment loss

where a document's first answer may weigh more than later ones (recipes.Recipe.first_weight).
infllm.selection_alignment_loss teaches the last rows (questions and answers) of some layers.
--out/log.jsonl has one line every --log-every steps.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time

import model as model_lib
import numpy as np
import optimizer as optimizer_lib
import recipes
import safetensors.torch
import samples
import torch
import torch.distributed as dist
import torch.nn.functional as F

import infllm

REST_WEIGHT = 0.3
AGREE_EVERY = 10  # steps between two looks at the clock that all processes share


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What all processes do in a step. mode is "dense", "sparse" or "end" (see recipes.Bucket)."""

    stage: recipes.Stage
    bucket: recipes.Bucket
    mode: str
    sparse: infllm.SparseConfig
    taught: tuple  # layers whose selection is taught

    @staticmethod
    def draw(recipe, seed, step):
        rng = np.random.default_rng([seed, step])
        stage, config = recipe.stage(step), recipe.config
        shares = np.array([b.share for b in stage.buckets])
        bucket = stage.buckets[rng.choice(len(shares), p=shares / shares.sum())]
        chance = rng.random()
        mode = "sparse" if chance < bucket.sparse else "dense"
        mode = "end" if bucket.sparse <= chance < bucket.sparse + bucket.end else mode
        local = config.sparse.budget_blocks - config.sparse.topk
        topk = int(rng.integers(recipe.budgets[0], recipe.budgets[1] + 1)) - local
        taught = rng.permutation(config.num_hidden_layers)[: stage.align_layers].tolist()
        taught = tuple(taught) if stage.align_rows else ()
        return Lesson(stage, bucket, mode, dataclasses.replace(config.sparse, topk=topk), taught)


class Steps(torch.utils.data.IterableDataset):
    """Batches in step order; worker w makes steps w, w + workers, ..."""

    def __init__(self, recipe, hay, tokenizer, seed, rank, first):
        self.recipe, self.hay, self.tokenizer = recipe, hay, tokenizer
        self.seed, self.rank, self.first = seed, rank, first

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        maker = samples.Maker(self.hay, samples.Codec(self.tokenizer), self.recipe.longest)
        for step in range(self.first + worker, self.recipe.steps, workers):
            lesson = Lesson.draw(self.recipe, self.seed, step)
            rng = np.random.default_rng([self.seed, self.rank + 1, step])
            made = [
                maker.conversation(
                    rng, lesson.bucket.length, lesson.stage.spread, lesson.stage.varied
                )
                for _ in range(lesson.bucket.batch)
            ]
            yield step, *(torch.from_numpy(np.stack(x)) for x in zip(*made))


class Attend:
    """Attention of one training step; gathers the alignment losses of the layers taught in it."""

    def __init__(self, config, lesson, count, length, device):
        self.config, self.lesson, self.losses = config, lesson, []
        # In mode "end" the questions are among these last rows, which attend to everything.
        self.end = 2 * lesson.stage.align_rows if lesson.mode == "end" else 0
        self.whole = self.plan(count, length, length, device, lesson.mode != "dense")
        if self.end:
            document = length - self.end
            self.document = self.plan(count, document, document, device, True)
            self.last = self.plan(count, self.end, length, device, False)
        rows = torch.arange(max(0, length - lesson.stage.align_rows), length, device=device)
        starts = torch.arange(0, count * length, length, device=device)
        self.rows = (starts[:, None] + rows).flatten().int()

    def plan(self, count, queries, keys, device, sparse):
        q, k = (
            torch.arange(count + 1, dtype=torch.int32, device=device) * n for n in (queries, keys)
        )
        return infllm.make_plan(
            q, k, queries, keys, sparse_config=self.lesson.sparse, sparse=sparse
        )

    def __call__(self, layer):
        return lambda q, k, v: self.run(q, k, v, layer in self.lesson.taught)

    def run(self, q, k, v, taught):
        if taught:
            loss = infllm.selection_alignment_loss(
                q, k, plan=self.whole, rows=self.rows, sparse_config=self.config.sparse
            )
            self.losses.append(loss.mean())
        config = self.lesson.sparse
        if not self.end:
            return infllm.attention(q, k, v, plan=self.whole, sparse_config=config)
        document, end = slice(None, -self.end), slice(-self.end, None)
        first = infllm.attention(
            q[:, document], k[:, document], v[:, document], plan=self.document, sparse_config=config
        )
        last = infllm.attention(q[:, end], k, v, plan=self.last, sparse_config=config)
        return torch.cat([first, last], 1)


def mean_of(loss, weight):
    return (loss * weight).sum() / weight.sum().clamp(min=1)


def losses(net, tokens, kinds, positions, attend, first_weight):
    """The loss of one batch, and its parts for the log."""
    logits = net(tokens[:, :-1], positions, attend).float()
    target, kind = tokens[:, 1:], kinds[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    loss = loss.view_as(target)
    first = kind == samples.FIRST_ANSWER
    answer = (kind == samples.ANSWER) + first_weight * first
    parts = {"answer_loss": mean_of(loss, answer), "rest_loss": mean_of(loss, kind == samples.REST)}
    total = parts["answer_loss"] + REST_WEIGHT * parts["rest_loss"]
    if attend.losses:
        parts["align_loss"] = torch.stack(attend.losses).mean()
        total = total + parts["align_loss"]
    with torch.no_grad():
        right = logits.argmax(-1) == target
        parts["answer_tokens_right"] = mean_of(right, answer > 0)
        parts["first_answers_right"] = (right | ~first).all(1).float().mean()
    return total, {name: value.detach() for name, value in parts.items()}


def average_gradients(parameters, world):
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(g.view_as(p))


def save_state(path, net, optimizers, **progress):
    temporary = path.with_suffix(".tmp")
    state = {"model": net.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save({**state, **progress}, temporary)
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="long", choices=tuple(recipes.RECIPES))
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path(".train/data"))
    parser.add_argument("--tokenizer", default="models/needle-32k/tokenizer.model")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".train/run"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--init", help="safetensors file to start from, with new optimizer state")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    args = parser.parse_args()
    began = time.monotonic()

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    recipe = recipes.RECIPES[args.recipe]
    torch.manual_seed(args.seed)
    net = model_lib.MiniCPM4(recipe.config).to(device)
    if args.init:
        given = safetensors.torch.load_file(args.init)
        net.load_state_dict({name: value.float() for name, value in given.items()})
    optimizers = optimizer_lib.build(net, "muon", recipe)

    args.out.mkdir(parents=True, exist_ok=True)
    state_file, first, before = args.out / "state.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        net.load_state_dict(state["model"])
        for o, s in zip(optimizers, state["optimizers"]):
            o.load_state_dict(s)
        first, before = state["step"], state["seconds"]
    parameters = list(net.parameters())
    if rank == 0:
        print(
            f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, from step {first} of "
            f"{recipe.steps}, {world} processes",
            flush=True,
        )
    hay = samples.Hay.load(args.data / "train.npz")
    loader = torch.utils.data.DataLoader(
        Steps(recipe, hay, args.tokenizer, args.seed, rank, first),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=6 if args.workers else None,
        pin_memory=cuda,
    )

    def seconds():
        return before + time.monotonic() - began

    log = open(args.out / "log.jsonl", "a", encoding="utf-8") if rank == 0 else None
    last_save, waited, step, spent = seconds(), 0.0, first - 1, seconds() / args.time_limit
    fetch_began = seconds()
    for step, *batch in loader:
        waited += seconds() - fetch_began
        tokens, kinds, positions = (x.to(device, non_blocking=True) for x in batch)
        count, length = positions.shape
        rate = recipe.rate(step, max((step + 1) / recipe.steps, spent))
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = group["base_lr"] * rate
        lesson = Lesson.draw(recipe, args.seed, step)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            attend = Attend(recipe.config, lesson, count, length, device)
            loss, parts = losses(net, tokens, kinds, positions, attend, recipe.first_weight)
        loss.backward()
        average_gradients(parameters, world)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=False)

        if rank == 0 and (step % args.log_every == 0 or step + 1 == recipe.steps):
            record = {
                "recipe": args.recipe,
                "step": step,
                "length": length,
                "batch": count,
                "attention": lesson.mode,
                **{name: round(float(value), 4) for name, value in parts.items()},
                "gradient": round(float(norm), 3),
                "rate": round(rate, 4),
                "waited": round(waited, 2),
                "seconds": round(seconds(), 1),
            }
            print(json.dumps(record), flush=True)
            print(json.dumps(record), file=log, flush=True)
            waited = 0.0
        if step % AGREE_EVERY == AGREE_EVERY - 1:
            shared = torch.tensor(seconds() / args.time_limit, device=device)
            if world > 1:
                dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            spent = float(shared)
            if rank == 0 and seconds() - last_save > args.save_every:
                save_state(state_file, net, optimizers, step=step + 1, seconds=seconds())
                last_save = seconds()
            if spent >= 1:
                break
        fetch_began = seconds()
    if rank == 0:
        save_state(state_file, net, optimizers, step=step + 1, seconds=seconds())
        print(f"stopped after step {step + 1} of {recipe.steps}, {seconds():.0f} s", flush=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if cuda:
        os._exit(0)  # loader workers may be making samples of steps that never come


if __name__ == "__main__":
    main()
