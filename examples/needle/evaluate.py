# SPDX-License-Identifier: Apache-2.0
"""Asks a checkpoint every question of a file of cases, dense and sparse, in PyTorch.

    python3 examples/needle/evaluate.py --model models/needle-32k --cases .train/cases.jsonl \\
        --out results.jsonl

What `infllm eval` does, faster on a GPU: a document is read once, then its questions are read side
by side, each with the right answer behind it. An answer counts if greedy decoding would give
exactly it and then <|im_end|>: that is so if the largest logit is the right one at every step.
"""

import argparse
import collections
import datetime
import functools
import json
import pathlib
import subprocess

import facts
import model as model_lib
import safetensors.torch
import samples
import torch

import infllm


def load(folder, device):
    net = model_lib.MiniCPM4(model_lib.Config.load(folder))
    state = safetensors.torch.load_file(str(pathlib.Path(folder) / "model.safetensors"))
    net.load_state_dict({k: v.float() for k, v in state.items()})
    return net.to(device).eval()


class Attend:
    """Keeps a document's keys and values; afterwards every row of a batch follows on them."""

    def __init__(self, config, sparse):
        self.config, self.sparse, self.kept = config, sparse, {}

    def __call__(self, layer):
        return functools.partial(self.run, layer)

    def run(self, layer, q, k, v):
        """q [N, T, Hq, d], k, v [N, T, Hkv, d] -> [N, T, Hq, d]"""
        if layer in self.kept:
            k, v = (
                torch.cat([kept.expand(len(x), -1, -1, -1), x], 1)
                for kept, x in zip(self.kept[layer], (k, v))
            )
        else:
            self.kept[layer] = k, v
        return infllm.attention(q, k, v, sparse_config=self.config, sparse=self.sparse)


@torch.no_grad()
def right_answers(net, codec, case, sparse, device, batch=32):
    """Which questions of the case are answered right: a list of bool."""
    document = [codec.bos, codec.im_start, *codec.segment("user\n" + case["document"])]
    pairs = [(codec.ask(q["question"]), codec.answer(q["answer"])) for q in case["questions"]]
    attend = Attend(net.config.sparse, sparse and net.config.sparse.is_sparse_at(len(document)))

    def read(rows, begin):
        tokens = torch.tensor(rows, device=device)
        positions = torch.arange(begin, begin + tokens.shape[1], device=device)
        return net(tokens, positions.expand_as(tokens), attend)

    read([document], 0)
    result = []
    for first in range(0, len(pairs), batch):
        part = pairs[first : first + batch]
        width = max(len(a) + len(b) for a, b in part)
        rows = [a + b + [codec.eos] * (width - len(a) - len(b)) for a, b in part]
        best = read(rows, len(document)).argmax(-1).tolist()
        for row, (a, b) in zip(best, part):
            result.append(row[len(a) - 1 : len(a) + len(b) - 1] == b)
    return result


def count(net, codec, cases, device, modes=("dense", "sparse")):
    """{(task, length, attention): [right, asked]}"""
    counts = collections.defaultdict(lambda: [0, 0])
    for case in cases:
        for attention in modes:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                right = right_answers(net, codec, case, attention == "sparse", device)
            for question, ok in zip(case["questions"], right):
                cell = counts[question["task"], case["length"], attention]
                cell[0] += ok
                cell[1] += 1
    return counts


def table(counts):
    """One line a task, dense and sparse side by side for each length."""
    tasks = [t for t in facts.TASKS if any(t == task for task, *_ in counts)]
    tasks += sorted({task for task, *_ in counts} - set(facts.TASKS))
    columns = sorted({(length, attention) for _, length, attention in counts})
    lines = [" " * 14 + "".join(f"{f'{n // 1024}K {a}':>14}" for n, a in columns)]
    for task in tasks:
        cells = ("/".join(map(str, counts.get((task, *column), (0, 0)))) for column in columns)
        lines.append(f"{task:14}" + "".join(f"{cell:>14}" for cell in cells))
    sums = ([v[0] for k, v in counts.items() if k[1:] == column] for column in columns)
    return "\n".join([*lines, f"{'all':14}" + "".join(f"{sum(x):>14}" for x in sums)])


def records(counts, config, model, device, commit):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for (task, length, attention), (right, asked) in sorted(counts.items()):
        visible = config.sparse.budget_blocks * config.sparse.block_size / length
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
    parser.add_argument("--documents", type=int, default=10**9, help="of each length, at most")
    parser.add_argument("--commit", help="default: git rev-parse")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = load(args.model, device)
    codec = samples.Codec(pathlib.Path(args.model) / "tokenizer.model")
    seen, cases = collections.Counter(), []
    with open(args.cases, encoding="utf-8") as file:
        for case in map(json.loads, file):
            seen[case["length"]] += 1
            if seen[case["length"]] <= args.documents:
                cases.append(case)
    counts = count(net, codec, cases, device)
    print(table(counts), flush=True)
    if args.out:
        commit = (
            args.commit
            or subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
            ).stdout.strip()
        )
        with open(args.out, "a", encoding="utf-8") as out:
            name = pathlib.Path(args.model).resolve().name
            for record in records(counts, net.config, name, device, commit):
                print(json.dumps(record), file=out)


if __name__ == "__main__":
    main()
