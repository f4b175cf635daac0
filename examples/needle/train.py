# SPDX-License-Identifier: Apache-2.0
"""Trains the model: short and dense first, then longer, dense and sparse in turn.

    torchrun --nproc-per-node 4 examples/needle/train.py --out .train/run      # one process a GPU
    python3 examples/needle/train.py --recipe smoke --out .train/smoke         # CPU, a minute

A step is wholly determined by (seed, rank, step): its length, attention, budget and samples. A run
stopped by --time-limit goes on from --out/state.pt. The loss is

    cross-entropy of the answers + 0.3 x cross-entropy of everything else + alignment loss

with selection.alignment_loss on the last rows (questions and answers) of every layer.
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
import selection
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

REST_WEIGHT = 0.3
FLEX_BLOCK = 128
LAST_ROWS, SHARED = 1024, 8  # see Attend.choose_blocks


def choose(recipe, seed, step):
    """What all ranks do in a step: stage, bucket, sparse or dense, block budget, taught layers."""
    rng = np.random.default_rng([seed, step])
    stage = recipe.stage(step)
    shares = np.array([b.share for b in stage.buckets])
    bucket = stage.buckets[rng.choice(len(shares), p=shares / shares.sum())]
    sparse = bool(rng.random() < bucket.sparse)
    low, high = recipe.budgets
    budget = int(rng.integers(low, high + 1))
    layers = rng.permutation(recipe.config.num_hidden_layers)[: stage.align_layers].tolist()
    return stage, bucket, sparse, budget, layers


class Steps(torch.utils.data.IterableDataset):
    """Batches in step order; worker w makes steps w, w + workers, ..."""

    def __init__(self, recipe, hay, tokenizer, seed, rank, first):
        self.recipe, self.hay, self.tokenizer = recipe, hay, tokenizer
        self.seed, self.rank, self.first = seed, rank, first

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        codec = samples.Codec(self.tokenizer)
        for step in range(self.first + worker, self.recipe.steps, workers):
            stage, bucket, *_ = choose(self.recipe, self.seed, step)
            rng = np.random.default_rng([self.seed, self.rank + 1, step])
            made = [
                samples.conversation(
                    rng, self.hay, codec, bucket.length, stage.spread, self.recipe.longest
                )
                for _ in range(bucket.batch)
            ]
            tokens, kinds, positions = (torch.from_numpy(np.stack(x)) for x in zip(*made))
            yield step, tokens, kinds, positions


class Attend:
    """Attention of one training step; gathers the alignment loss of the layers taught in it."""

    def __init__(self, config, length, device, sparse, budget, align_rows, align_layers, flex):
        self.config, self.sparse, self.budget, self.flex = config, sparse, budget, flex
        self.positions = torch.arange(length, device=device)
        self.align_rows, self.align_layers, self.losses = align_rows, align_layers, []

    def __call__(self, layer):
        taught = self.align_rows and layer in self.align_layers
        return lambda q, k, v: self.run(q, k, v, taught)

    def run(self, q, k, v, taught):
        if taught:
            rows = slice(-self.align_rows, None)
            with torch.autocast(q.device.type, enabled=False):
                self.losses.append(
                    selection.alignment_loss(
                        q[:, :, rows], k, self.positions[rows], self.config.sparse
                    )
                )
        if not self.sparse:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        with torch.autocast(q.device.type, enabled=False):
            chosen = self.choose_blocks(q, k)
        if self.flex is None:
            mask = model_lib.token_mask(
                chosen, self.positions, k.shape[2], self.config.sparse.block_size
            )
            return model_lib.masked_attention(q, k, v, mask)
        return self.flex(
            q, k, v, block_mask=flex_mask(chosen, q.shape[1], self.config.sparse), enable_gqa=True
        )

    def choose_blocks(self, q, k):
        """The last rows (questions, answers) choose one by one; before them SHARED rows choose as
        the first of them does, which makes selection SHARED times cheaper. Training only."""
        cut = max(0, q.shape[2] - LAST_ROWS)
        first, last = (
            selection.select(
                q[:, :, rows], k, self.positions[rows], self.config.sparse, self.budget
            )
            for rows in (slice(0, cut, SHARED), slice(cut, None))
        )
        return torch.cat([first.repeat_interleave(SHARED, 2), last], 2)


def flex_mask(chosen, heads, config):
    """FlexAttention's mask: a 128 x 128 tile is visited if any of its tokens chose its blocks."""
    n, hk, rows, blocks = chosen.shape
    group, per_tile = heads // hk, FLEX_BLOCK // config.block_size
    tiles = chosen.view(n, hk, rows // FLEX_BLOCK, FLEX_BLOCK, blocks // per_tile, per_tile)
    tiles = tiles.any(-1).any(3)
    if hk > 1:
        tiles = tiles.repeat_interleave(group, 1)
    order = tiles.int().argsort(dim=-1, descending=True, stable=True).int()
    block_size = config.block_size

    def visible(b, h, q, k):
        return chosen[b, h // group, q, k // block_size] & (q >= k)

    return BlockMask.from_kv_blocks(
        tiles.sum(-1).int(),
        order,
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(rows, rows),
    )


def losses(net, tokens, kinds, positions, attend):
    """The loss of one batch, and its parts for the log."""
    h = net.hidden(tokens[:, :-1], positions, attend)
    logits = net.logits(h).float()
    target, kind = tokens[:, 1:], kinds[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    answer, rest = (kind == samples.ANSWER).flatten(), (kind == samples.REST).flatten()
    answer_loss = (loss * answer).sum() / answer.sum().clamp(min=1)
    rest_loss = (loss * rest).sum() / rest.sum().clamp(min=1)
    align = torch.stack(attend.losses).mean() if attend.losses else loss.new_zeros(())
    with torch.no_grad():
        right = (logits.argmax(-1) == target) & (kind == samples.ANSWER)
        tokens_right = right.sum() / answer.sum().clamp(min=1)
    total = answer_loss + REST_WEIGHT * rest_loss + align
    return total, {
        "answer_loss": answer_loss.detach(),
        "rest_loss": rest_loss.detach(),
        "align_loss": align.detach(),
        "answer_tokens_right": tokens_right,
    }


def average_gradients(parameters, world):
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(g.view_as(p))


def save_state(path, net, optimizers, step):
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "model": net.state_dict(),
            "step": step,
            "optimizers": [o.state_dict() for o in optimizers],
        },
        temporary,
    )
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="long", choices=tuple(recipes.RECIPES))
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path(".train/data"))
    parser.add_argument("--tokenizer", default="models/needle-32k/tokenizer.model")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".train/run"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, default=None)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default=None)
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
        torch.backends.cuda.matmul.allow_tf32 = True
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    recipe = recipes.RECIPES[args.recipe]
    config = recipe.config
    if args.kv_heads:
        config = dataclasses.replace(config, num_key_value_heads=args.kv_heads)
    torch.manual_seed(args.seed)
    net = model_lib.MiniCPM4(config).to(device)
    if args.init:
        given = safetensors.torch.load_file(args.init)
        net.load_state_dict({name: value.float() for name, value in given.items()})
    optimizers = optimizer_lib.build(net, args.optimizer or recipe.optimizer, recipe)
    flex = None
    if cuda:
        torch._dynamo.config.recompile_limit = 64
        flex = torch.compile(flex_attention, dynamic=False)

    args.out.mkdir(parents=True, exist_ok=True)
    state_file, first = args.out / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        net.load_state_dict(state["model"])
        for o, s in zip(optimizers, state["optimizers"]):
            o.load_state_dict(s)
        first = state["step"]
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

    log = open(args.out / "log.jsonl", "a", encoding="utf-8") if rank == 0 else None
    last_save, waited, step = time.monotonic(), 0.0, first - 1
    fetch_began = time.monotonic()
    for step, tokens, kinds, positions in loader:
        waited += time.monotonic() - fetch_began
        tokens, kinds, positions = (
            x.to(device, non_blocking=True) for x in (tokens, kinds, positions)
        )
        length = tokens.shape[1] - 1
        rate = recipe.rate(step)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = group["base_lr"] * rate
        stage, _, sparse, budget, layers = choose(recipe, args.seed, step)
        attend = Attend(config, length, device, sparse, budget, stage.align_rows, layers, flex)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, parts = losses(net, tokens, kinds, positions, attend)
        loss.backward()
        average_gradients(parameters, world)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=False)

        if rank == 0 and (step % args.log_every == 0 or step + 1 == recipe.steps):
            if cuda:
                torch.cuda.synchronize()
            now = time.monotonic()
            record = {
                "step": step,
                "length": length,
                "batch": tokens.shape[0],
                "sparse": sparse,
                **{name: round(float(value), 4) for name, value in parts.items()},
                "gradient": round(float(norm), 3),
                "rate": round(rate, 4),
                "waited": round(waited, 2),
                "seconds": round(now - began, 1),
            }
            print(json.dumps(record), flush=True)
            print(json.dumps(record), file=log, flush=True)
            waited = 0.0
        if step % 20 == 19:
            stop = torch.tensor(float(time.monotonic() - began > args.time_limit), device=device)
            if world > 1:
                dist.all_reduce(stop, op=dist.ReduceOp.MAX)
            if rank == 0 and (stop or time.monotonic() - last_save > args.save_every):
                save_state(state_file, net, optimizers, step + 1)
                last_save = time.monotonic()
            if stop:
                break
        fetch_began = time.monotonic()
    if rank == 0:
        save_state(state_file, net, optimizers, step + 1)
        print(f"stopped after step {step + 1} of {recipe.steps}", flush=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
