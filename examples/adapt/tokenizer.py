# SPDX-License-Identifier: Apache-2.0
"""Trains the tokenizer: examples/needle's recipe with 8184 pieces on this experiment's text.

python3 examples/adapt/tokenizer.py --out .train/adapt/tokenizer
"""

import argparse
import pathlib
import random

import numpy as np
import ruler
import settings
import text
from needle import make_tokenizer

PIECES = 8184  # with the 8 added tokens: 8192
SAMPLE = 12_000_000  # characters of the text that the trainer sees


def sentences(texts, sample=SAMPLE, fact_share=0.03):
    """Lines of the text, at most `sample` characters of them, with the tasks' sentences mixed in."""
    rng, words = random.Random(1), ["word"] * 64
    total = sum(len(document) for _, document in texts)
    for _, document in texts:
        for line in document.split("\n"):
            if rng.random() * total > sample:
                continue
            yield line[:4000]
            if rng.random() < fact_share:
                tasks = ruler.Tasks(np.random.default_rng(rng.getrandbits(32)), words)
                drawn = tasks.draw(rng.choice(ruler.TASKS[:9]), 64, len)
                for turn in drawn.turns[:1]:
                    yield turn.question
                    yield " ".join([turn.lead, *map(str, turn.items)])
                yield from (fact.text for fact in drawn.facts[:2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    settings.add_paths(parser)
    parser.add_argument("--out", type=pathlib.Path, default=settings.ROOT / "tokenizer")
    parser.add_argument("--pieces", type=int, default=PIECES)
    parser.add_argument("--max-length", type=int, default=65536)
    args = parser.parse_args()
    model = make_tokenizer.train(sentences(text.load(args.text, "train")), args.pieces)
    make_tokenizer.write(args.out, model, args.max_length)


if __name__ == "__main__":
    main()
