# SPDX-License-Identifier: Apache-2.0
"""Scores a checkpoint on the eleven tasks and on held-out text, dense and sparse.

    python3 examples/adapt/evaluate.py --config C --model D/model --arm aligned --out results.jsonl

One pass a case: an item of an answer is right if, after the question and the right items before it,
the largest logit is the right one at each of its tokens (of the common words: is any that is still
missing). A task's score is the share of right items, as RULER counts; the records keep the right
items of every case, in an order that is the same for all checkpoints. Perplexity is that of the same
held-out tokens with more and more text before them. Below dense_len both readings are one; above, a
reading that matters less can be given fewer cases. Cases that --out has already are not scored again:
interrupted, an evaluation goes on, and with other limits it gets the cases that are missing.
"""

import argparse
import collections
import dataclasses
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

SEED = 2_000_003  # training seeds are small
SCORED = 2048  # tokens at the end of a held-out text whose losses are averaged
NAMES = {False: "dense", True: "sparse"}


def cases_of(args, settings, length: int) -> int:
    return min(args.most, settings.evaluate["cases"].get(str(length), 0))


class Cases(torch.utils.data.Dataset):
    """Batches of cases, round robin over tasks: (length, tokens [B, length + 1], and of each case its
    number, task and items). missing(number, task, length): whether a case is to be scored."""

    def __init__(self, args, settings, lengths, missing):
        self.args, self.batches = args, []
        for length in lengths:
            size = max(1, settings.tokens_per_step // length)
            numbers = range(cases_of(args, settings, length))
            cases = [(i, task) for i in numbers for task in ruler.TASKS if missing(i, task, length)]
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
        return length, tokens, [(*case, s.items) for case, s in zip(cases, made)]


class Scorer:
    """Runs batches [B, length + 1] through the model with one of the attentions."""

    def __init__(self, net, device):
        self.net, self.device, self.ropes = net, device, {}

    @torch.no_grad()
    def __call__(self, tokens, sparse: bool):
        """losses and likeliest tokens [B, length]."""
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
        return losses.view(count, length), best.view(count, length)


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


class Results:
    """Right items of every case, in order, and the file that they come from and go to."""

    def __init__(self, path: pathlib.Path, common: dict):
        self.path, self.common, self.changed = path, common, set()
        self.right, self.asked = collections.defaultdict(list), collections.Counter()
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            record = json.loads(line)
            if record["name"] == "adapt.task":
                key = record["task"], record["length"], record["attention"] == NAMES[True]
                self.right[key], self.asked[key] = record["each"], record["total"]

    def count(self, task, length, sparse) -> int:
        """How many cases there are already."""
        return len(self.right.get((task, length, sparse), ()))

    def add(self, task, length, sparse, right: int, asked: int) -> None:
        self.changed.add((task, length, sparse))
        self.right[task, length, sparse].append(right)
        self.asked[task, length, sparse] += asked

    def write(self, *records: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as out:
            for record in records:
                print(json.dumps(record), file=out)

    def flush(self) -> None:
        """Writes what has come, with what was there of it, and says the scores of each task."""
        records, cells = [], collections.defaultdict(list)
        for task, length, sparse in sorted(self.changed, key=lambda key: ruler.TASKS.index(key[0])):
            each, total = self.right[task, length, sparse], self.asked[task, length, sparse]
            records.append({"name": "adapt.task", **self.common, "task": task, "length": length,
                            "attention": NAMES[sparse], "correct": sum(each), "total": total,
                            "each": each})  # fmt: skip
            cells[length, NAMES[sparse]].append(100 * sum(each) / total)
        self.write(*records)
        for (length, name), scores in cells.items():
            print(f"{self.common['arm']} {length} {name}: {np.mean(scores):.2f}",
                  *(f"{x:.0f}" for x in scores), file=sys.stderr, flush=True)  # fmt: skip
        self.changed.clear()


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
    for name in NAMES.values():
        parser.add_argument(f"--most-{name}", type=int, default=sys.maxsize, help="read so, that is")
    parser.add_argument("--topk", type=int, help="instead of the checkpoint's; read sparse only")
    parser.add_argument("--no-text", action="store_true", help="no perplexity")
    parser.add_argument("--deadline", type=float, default=math.inf, help="Unix time")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    began = time.time()
    settings = settings_lib.load(args.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = checkpoint.load(args.model, device)
    if args.topk is not None:
        sparse = dataclasses.replace(net.config.sparse, topk=args.topk)
        net.config = dataclasses.replace(net.config, sparse=sparse)
    if device.type == "cuda" and not args.no_compile:
        net.compile(settings.tokens_per_step)
    score = Scorer(net, device)
    readings = (False, True) if args.topk is None else (True,)

    def wanted(length, sparse):
        most = getattr(args, f"most_{NAMES[sparse]}")
        if not net.config.sparse.is_sparse_at(length):
            most = sys.maxsize
        return min(most, cases_of(args, settings, length)) if sparse in readings else 0

    # The longest that training saw first: if time runs out, that is known.
    lengths = args.lengths or sorted(map(int, settings.evaluate["cases"]), reverse=True)
    common = {
        "model": settings.name, "arm": args.arm, "seed": args.seed, **origin.fields(),
        "blocks": net.config.sparse.budget_blocks,
    }  # fmt: skip
    results = Results(args.out, common)

    def missing(number, task, length, sparse):
        return results.count(task, length, sparse) <= number < wanted(length, sparse)

    cases = Cases(args, settings, lengths, lambda *case: any(missing(*case, s) for s in readings))
    loader = torch.utils.data.DataLoader(cases, batch_size=None, num_workers=args.workers)
    last = None
    for length, tokens, items in loader:
        if length != last:
            results.flush()
            last = length
        if time.time() > args.deadline:
            break
        best = {}  # of the batch, by whether it was attended to sparsely
        for sparse in readings:
            chosen = sparse and net.config.sparse.is_sparse_at(length)
            rows = [row for row, item in enumerate(items) if missing(item[0], item[1], length, sparse)]
            if rows and chosen not in best:
                best[chosen] = score(tokens, chosen)[1].cpu()
            for row in rows:
                _, task, asked = items[row]
                right = right_items(tokens[row], best[chosen][row], asked)
                results.add(task, length, sparse, right, len(asked))
    results.flush()
    losses = collections.defaultdict(list)
    contexts = [] if args.no_text or args.topk is not None else settings.evaluate["perplexity"]
    filler = documents.Filler(args.data, "heldout")
    for length, tokens in held_out_texts(filler, contexts, settings.evaluate["documents"], 1):
        if time.time() > args.deadline:
            break
        for sparse in readings:
            if not sparse or net.config.sparse.is_sparse_at(length):
                out, _ = score(tokens, sparse)
            losses[length, sparse].append(float(out[0, -min(SCORED, length // 2) :].mean()))
    results.write(
        *({"name": "adapt.perplexity", **common, "length": length, "attention": NAMES[sparse],
           "nll": round(float(np.mean(values)), 5), "texts": len(values),
           "each": [round(x, 4) for x in values]} for (length, sparse), values in sorted(losses.items()))
    )  # fmt: skip
    late = time.time() > args.deadline
    print(f"{args.arm}: {'out of time' if late else 'evaluated'} after {time.time() - began:.0f} s",
          file=sys.stderr, flush=True)  # fmt: skip
    sys.exit(os.EX_TEMPFAIL if late else None)


if __name__ == "__main__":
    main()
