# SPDX-License-Identifier: Apache-2.0
"""Scores a checkpoint on the eleven tasks and on held-out text, dense and sparse.

    python3 examples/adapt/evaluate.py --config C --model D/model --arm aligned --out results.jsonl

One pass a case: an item of an answer is right if, after the question and the right items before it,
the largest logit is the right one at each of its tokens (of the common words: is any that is still
missing). A task's score is the share of right items, as RULER counts; the records keep the right
items of every case, in an order that is the same for all checkpoints. Perplexity is that of the same
held-out tokens with more and more text before them. Below dense_len both readings are one.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import json
import math
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

SEED = 2_000_003  # training seeds are small
SCORED = 2048  # tokens at the end of a held-out text whose losses are averaged


class Cases(torch.utils.data.Dataset):
    """Batches of cases, round robin over tasks: (length, tokens [B, length + 1], task and items of each)."""

    def __init__(self, args, settings, lengths, tasks):
        self.args, self.batches = args, []
        for length in lengths:
            size = max(1, settings.tokens_per_step // length)
            count = min(args.most, settings.evaluate["cases"].get(str(length), 0))
            cases = [(i, task) for i in range(count) for task in tasks]
            self.batches += [(length, cases[i : i + size]) for i in range(0, len(cases), size)]
        self.maker = None

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        if self.maker is None:  # once in each worker
            filler = documents.Filler(self.args.data, "heldout")
            self.maker = documents.Maker(self.args.tokenizer, filler)
        length, cases = self.batches[index]
        made = [self.maker.case(SEED + i, task, length) for i, task in cases]
        tokens = torch.from_numpy(np.stack([s.tokens for s in made]))
        return length, tokens, [(task, s.items) for (_, task), s in zip(cases, made)]


class Scorer:
    """Runs batches [B, length + 1] through the model with one of the attentions."""

    def __init__(self, net, device):
        self.net, self.device, self.ropes = net, device, {}

    @torch.no_grad()
    def __call__(self, tokens, sparse: bool):
        """losses and likeliest tokens [B, length], on the host."""
        count, length = tokens.shape[0], tokens.shape[1] - 1
        if (count, length) not in self.ropes:
            positions = torch.arange(length, device=self.device).repeat(count)
            self.ropes = {(count, length): network.rope_table(positions, self.net.config)}
        tokens = tokens.to(self.device, non_blocking=True)
        config = self.net.config.sparse if sparse else None
        attend = attending.Attend(count * length, length, self.device, config)
        losses, best = self.net(
            tokens[:, :-1].flatten(), tokens[:, 1:].flatten(), *self.ropes[count, length], attend
        )
        return losses.view(count, length).cpu(), best.view(count, length).cpu()


def right_items(tokens, best, items) -> int:
    """How many items of one case are right. tokens [length + 1], best [length]."""
    right = 0
    for _, choices, first, last in items:
        said = best[first - 1 : last - 1]
        right += said.item() in choices if choices else torch.equal(said, tokens[first:last])
    return right


def held_out_texts(filler, lengths, count, bos):
    """(length, tokens [1, length + 1]): texts that end at the same `count` places."""
    tokens = filler.hay.tokens
    longest = max(lengths, default=0)
    ends = np.linspace(longest + 1, len(tokens) - 1, count).astype(int)
    for end in ends:
        for length in lengths:
            text = np.concatenate([[bos], tokens[max(0, end - length) : end]]).astype(np.int64)
            if len(text) == length + 1:
                yield length, torch.from_numpy(text)[None]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    settings_lib.add_paths(parser)
    parser.add_argument("--config", default=settings_lib.HERE / "configs/h200.toml")
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--arm", required=True, help="what the records call this checkpoint")
    parser.add_argument("--seed", type=int, default=1, help="of the training run, for the records")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="append records here")
    parser.add_argument("--lengths", type=int, nargs="+", help="only these")
    parser.add_argument("--most", type=int, default=sys.maxsize, help="cases a task and length")
    parser.add_argument("--topk", type=int, help="instead of the checkpoint's; read sparse only")
    parser.add_argument("--deadline", type=float, default=math.inf, help="Unix time")
    parser.add_argument("--workers", type=int, default=12)
    args = parser.parse_args()
    settings = settings_lib.load(args.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = checkpoint.load(args.model, device)
    if args.topk is not None:
        sparse = dataclasses.replace(net.config.sparse, topk=args.topk)
        net.config = dataclasses.replace(net.config, sparse=sparse)
    score = Scorer(net, device)
    readings = (False, True) if args.topk is None else (True,)
    # The longest that training saw first: if time runs out, that is known.
    lengths = args.lengths or sorted(map(int, settings.evaluate["cases"]), reverse=True)
    began, right, asked = time.time(), collections.defaultdict(list), collections.Counter()
    loader = torch.utils.data.DataLoader(
        Cases(args, settings, lengths, ruler.TASKS), batch_size=None, num_workers=args.workers
    )
    for done, (length, tokens, items) in enumerate(loader):
        if time.time() > args.deadline:
            print(f"{args.arm}: out of time at batch {done} of {len(loader)}", file=sys.stderr)
            break
        for sparse in readings:
            if not sparse or net.config.sparse.is_sparse_at(length):
                _, best = score(tokens, sparse)
            for row, (task, asked_for) in enumerate(items):
                right[task, length, sparse].append(right_items(tokens[row], best[row], asked_for))
                asked[task, length, sparse] += len(asked_for)
    losses = collections.defaultdict(list)
    filler = documents.Filler(args.data, "heldout")
    contexts = [] if args.topk is not None else settings.evaluate["perplexity"]
    texts = held_out_texts(filler, contexts, settings.evaluate["documents"], 1)
    for length, tokens in texts:
        if time.time() > args.deadline + 15:
            break
        for sparse in readings:
            if not sparse or net.config.sparse.is_sparse_at(length):
                out, _ = score(tokens, sparse)
            losses[length, sparse].append(float(out[0, -min(SCORED, length // 2) :].mean()))
    common = {
        "model": settings.name, "arm": args.arm, "seed": args.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "date": datetime.date.today().isoformat(), "blocks": net.config.sparse.budget_blocks,
    }  # fmt: skip
    names = {False: "dense", True: "sparse"}
    with contextlib.closing(open(args.out, "a", encoding="utf-8")) as out:
        for (task, length, sparse), each in sorted(right.items()):
            record = {"name": "adapt.task", **common, "task": task, "length": length,
                      "attention": names[sparse], "correct": sum(each),
                      "total": asked[task, length, sparse], "each": each}  # fmt: skip
            print(json.dumps(record), file=out)
        for (length, sparse), values in sorted(losses.items()):
            record = {"name": "adapt.perplexity", **common, "length": length,
                      "attention": names[sparse], "nll": round(float(np.mean(values)), 5),
                      "texts": len(values), "each": [round(x, 4) for x in values]}  # fmt: skip
            print(json.dumps(record), file=out)
    for length in lengths:
        cells = []
        for sparse in (False, True):
            scores = [100 * sum(right[key]) / asked[key]
                      for key in ((task, length, sparse) for task in ruler.TASKS) if asked[key]]
            each = " ".join(f"{x:.0f}" for x in scores)
            cells.append(f"{names[sparse]} {np.mean(scores) if scores else 0:.2f} ({each})")
        print(f"{args.arm} {length}: {', '.join(cells)}", file=sys.stderr)
    print(f"{args.arm}: evaluated in {time.time() - began:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
