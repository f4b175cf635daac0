# SPDX-License-Identifier: Apache-2.0
"""Times one training step of the experiment's model: forward, backward and optimizer, one GPU.

    python3 examples/adapt/bench_step.py --model D/model --out bench/results/adapt.jsonl

Every attention gets the same step: sequences of one length, tokens_per_step of them in all (or one
sequence, if that is longer), of a checkpoint on training documents. Without a checkpoint, weights and
tokens are random: then neighbours choose other blocks, which sparse attention pays for. A step's time
is the median between CUDA events. MFU counts the arithmetic of the matrices and of the attention's
visible pairs, forward and twice that backward, without recomputation, over the peak that is given.
"""

import argparse
import json
import pathlib
import statistics
import sys

import attending
import checkpoint
import documents
import network
import numpy as np
import origin
import settings as settings_lib
import torch
import train

PEAK = 989e12  # dense bf16 of an H100 or H200, from the data sheet


def visible_pairs(length: int, sparse) -> float:
    """Keys that the tokens of one sequence attend to, summed."""
    position = np.arange(length)
    pairs = position + 1.0
    if sparse is not None and sparse.is_sparse_at(length):
        pairs = np.minimum(pairs, 64.0 * (sparse.budget_blocks - 1) + position % 64 + 1)
    return float(pairs.sum())


def flops(config, length: int, count: int, sparse) -> float:
    """Of a training step: 6 a weight and token, 12 D a head and visible pair; selection apart."""
    c, d = config, config.head_dim
    layer = 2 * c.hidden_size * c.hidden_size + 2 * c.hidden_size * c.num_key_value_heads * d
    layer += 3 * c.hidden_size * c.intermediate_size
    weights = c.num_hidden_layers * layer + c.hidden_size * c.vocab_size
    attention = 12.0 * d * c.num_attention_heads * visible_pairs(length, sparse)
    return 6.0 * weights * count * length + c.num_hidden_layers * count * attention


def batch(args, config, length: int, count: int):
    """tokens and kinds [count, length + 1], on the host."""
    rng = np.random.default_rng(1)
    if args.model is None:
        tokens = rng.integers(3, config.vocab_size, (count, length + 1))
        kinds = rng.integers(documents.REST, documents.ANSWER + 1, tokens.shape)
    else:
        maker = documents.Maker(args.tokenizer, documents.Filler(args.data, "train"))
        made = [maker.training(rng, length) for _ in range(count)]
        tokens, kinds = np.stack([s.tokens for s in made]), np.stack([s.kinds for s in made])
    return torch.from_numpy(tokens), torch.from_numpy(kinds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    settings_lib.add_paths(parser)
    parser.add_argument("--config", default=settings_lib.HERE / "configs/h200.toml")
    parser.add_argument("--model", type=pathlib.Path, help="a checkpoint, on documents of --data")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--arms", nargs="+", default=list(attending.ARMS), choices=attending.ARMS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, help="append records here")
    args = parser.parse_args()
    settings, device = settings_lib.load(args.config), torch.device("cuda")
    torch.manual_seed(1)
    net = network.Network(checkpoint.config_of(settings))
    if args.model:
        checkpoint.read(net, args.model)
    net = net.to(device)
    optimizers = train.Optimizers(net, settings.optimizer)
    generator = torch.Generator().manual_seed(1)
    about = {"model": settings.name, "weights": "trained" if args.model else "random", **origin.fields()}
    for length in args.lengths:
        count = max(1, settings.tokens_per_step // length)
        total = count * length
        if not args.no_compile:
            net.compile(total)
        rope = network.rope_table(torch.arange(length, device=device).repeat(count), net.config)
        tokens, kinds = batch(args, net.config, length, count)
        given = tokens.to(device), kinds.to(device)
        for arm in args.arms:
            sparse = net.config.sparse if attending.ARMS[arm].sparse else None
            times = []
            for _ in range(args.warmup + args.steps):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                lesson = {}
                if attending.ARMS[arm].taught:
                    lesson = train.draw_lesson(settings.align, net.config, kinds, generator)
                attend = attending.Attend(total, length, device, sparse, **lesson)
                loss, *_ = train.step_losses(net, *given, attend, rope, settings.optimizer)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizers.step(0.0)  # as long as any, and the weights stay what they are
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end))
            times = times[args.warmup :]
            ms = statistics.median(times)
            record = {
                "name": "adapt.step", **about, "arm": arm, "length": length, "sequences": count,
                "ms": round(ms, 3), "ms_low": round(min(times), 3), "ms_high": round(max(times), 3),
                "tokens_per_second": round(1000 * total / ms),
                "mfu": round(flops(net.config, length, count, sparse) / ms * 1e3 / PEAK, 4),
                "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
            }  # fmt: skip
            torch.cuda.reset_peak_memory_stats()
            print(json.dumps(record), file=sys.stdout, flush=True)
            if args.out:
                with open(args.out, "a", encoding="utf-8") as out:
                    print(json.dumps(record), file=out)


if __name__ == "__main__":
    main()
