# SPDX-License-Identifier: Apache-2.0
"""Asks a checkpoint every question of make_cases.py, with dense and with sparse attention.

    python3 examples/needle/evaluate.py --model models/needle-32k --cases .train/cases.jsonl \\
        --out bench/results/needle-pytorch.jsonl

A document is read once; its questions branch off the cache. An answer counts if greedy decoding
would give exactly it and then <|im_end|>: that is so if, with the right answer fed in, the largest
logit is the right one at every step, which one pass decides.
"""

import argparse
import collections
import dataclasses
import datetime
import json
import os
import pathlib
import subprocess

import facts
import model as model_lib
import safetensors.torch
import samples
import torch


def load(folder, device):
    config = model_lib.Config.load(pathlib.Path(folder) / "config.json")
    net = model_lib.MiniCPM4(config)
    state = safetensors.torch.load_file(str(pathlib.Path(folder) / "model.safetensors"))
    net.load_state_dict({k: v.float() for k, v in state.items()})
    return net.to(device).eval()


def document_ids(codec, document):
    return [codec.bos, codec.im_start] + codec.segment("user\n" + document)


@torch.no_grad()
def right_answers(net, codec, case, sparse, device, batch=32):
    """Which questions of the case are answered right: a list of bool."""
    document = document_ids(codec, case["document"])
    pairs = [(codec.ask(q["question"]), codec.answer(q["answer"])) for q in case["questions"]]
    longest = len(document) + max(len(a) + len(b) for a, b in pairs)
    sparse = sparse and longest >= net.config.sparse.dense_len
    cache = model_lib.Cache(net.config.num_hidden_layers)
    model_lib.read(net, torch.tensor([document], device=device), cache, sparse, kept=1)
    result = []
    for first in range(0, len(pairs), batch):
        part = pairs[first : first + batch]
        width = max(len(a) + len(b) for a, b in part)
        ids = torch.full((len(part), width), codec.eos)
        for row, (a, b) in enumerate(part):
            ids[row, : len(a) + len(b)] = torch.tensor(a + b)
        h = model_lib.read(net, ids.to(device), cache.branch(len(part)), sparse)
        best = net.logits(h).argmax(-1).cpu()
        for row, (a, b) in enumerate(part):
            result.append(best[row, len(a) - 1 : len(a) + len(b) - 1].tolist() == b)
    return result


def count(net, codec, cases, device):
    """{(task, length, attention): [right, asked]}"""
    counts = collections.defaultdict(lambda: [0, 0])
    for case in cases:
        for attention in ("dense", "sparse"):
            right = right_answers(net, codec, case, attention == "sparse", device)
            for question, ok in zip(case["questions"], right):
                cell = counts[question["task"], case["length"], attention]
                cell[0] += ok
                cell[1] += 1
    return counts


def table(counts):
    lengths = sorted({length for _, length, _ in counts})
    lines = [f"{'task':14}" + "".join(f"{f'{n // 1024}K dense':>12}{'sparse':>8}" for n in lengths)]
    others = sorted({task for task, _, _ in counts} - set(facts.TASKS))
    for task in [t for t in facts.TASKS if any(k[0] == t for k in counts)] + others:
        cells = ""
        for n in lengths:
            for attention, width in (("dense", 12), ("sparse", 8)):
                right, asked = counts.get((task, n, attention), (0, 0))
                cells += f"{right}/{asked}".rjust(width)
        lines.append(f"{task:14}{cells}")
    totals = {a: sum(v[0] for k, v in counts.items() if k[2] == a) for a in ("dense", "sparse")}
    lines.append(
        f"all: dense {totals['dense']}, sparse {totals['sparse']}, "
        f"sparse / dense {totals['sparse'] / max(1, totals['dense']):.4f}"
    )
    return "\n".join(lines)


def records(counts, config, model, device, commit):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for (task, length, attention), (right, asked) in sorted(counts.items()):
        visible = config.sparse.budget * config.sparse.block_size / length
        yield {
            "name": "eval.needle",
            "model": model,
            "backend": "pytorch",
            "device": name,
            "commit": commit,
            "date": datetime.date.today().isoformat(),
            "task": task,
            "length": length,
            "attention": attention,
            "correct": right,
            "total": asked,
            "visible_share": 1.0 if attention == "dense" else round(min(1.0, visible), 4),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/needle-32k")
    parser.add_argument("--cases", default=".train/cases.jsonl")
    parser.add_argument("--out", help="append records here")
    parser.add_argument("--lengths", type=int, nargs="+", help="only these")
    parser.add_argument("--documents", type=int, default=10**9, help="of each length, at most")
    parser.add_argument("--topk", type=int, help="instead of the checkpoint's")
    parser.add_argument("--commit", help="default: git rev-parse")
    args = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    net = load(args.model, device)
    if args.topk:
        sparse = dataclasses.replace(net.config.sparse, topk=args.topk)
        net.config = dataclasses.replace(net.config, sparse=sparse)
    codec = samples.Codec(pathlib.Path(args.model) / "tokenizer.model")
    with open(args.cases, encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    seen = collections.Counter()
    kept = []
    for case in cases:
        seen[case["length"]] += 1
        if (not args.lengths or case["length"] in args.lengths) and (
            seen[case["length"]] <= args.documents
        ):
            kept.append(case)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=cuda):
        counts = count(net, codec, kept[rank::world], device)
    if world > 1:
        torch.distributed.init_process_group("gloo")
        gathered = [None] * world
        torch.distributed.all_gather_object(gathered, dict(counts))
        counts = collections.defaultdict(lambda: [0, 0])
        for part in gathered:
            for key, (right, asked) in part.items():
                counts[key] = [counts[key][0] + right, counts[key][1] + asked]
        torch.distributed.destroy_process_group()
    if rank:
        return
    print(table(counts), flush=True)
    if args.out:
        commit = (
            args.commit
            or subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip()
        )
        name = pathlib.Path(args.model).resolve().name
        name += f", topk {args.topk}" if args.topk else ""
        with open(args.out, "a", encoding="utf-8") as out:
            for record in records(counts, net.config, name, device, commit):
                print(json.dumps(record), file=out)


if __name__ == "__main__":
    main()
