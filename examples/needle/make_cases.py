# SPDX-License-Identifier: Apache-2.0
"""Writes the evaluation set: held-out text, held-out seeds, one JSON document a line.

    python3 examples/needle/make_cases.py --text .train/text --out .train/cases.jsonl

    {"id": "8192-003", "length": 8192, "tokens": 8190, "document": "...",
     "questions": [{"task": "single", "question": "What is the ...?", "answer": "48213"}, ...]}

`tokens` counts the whole prompt with the document's longest question: <s>, template, document,
question, generation prompt. It is at most `length`. Every length has --per-task questions of each
task; the questions of one document share it, so that it need be read only once.
The same seed, text and tokenizer give the same file.
"""

import argparse
import json
import pathlib

import facts
import numpy as np
import samples

LENGTHS = (4096, 8192, 16384, 32768)
SEED = 20_261_122  # never used in training, whose seeds are small
PACKAGE = "sqlite3-doc"


def questions_per_document(length):
    """Of each task; a short document has room for fewer facts."""
    return 4 if length < 8192 else 8


def draw(rng, each):
    generator = facts.Generator(rng)
    sets = [generator.multi_key() for _ in range(each // 4)]
    for task in ("single", "multi_value", "last_update"):
        sets += [generator.draw(task) for _ in range(each)]
    return facts.merge(sets)


def make_case(rng, hay, units, codec, length, number):
    drawn = draw(rng, questions_per_document(length))
    overhead = len(codec.head()) + max(len(codec.ask(q.text)) for q in drawn.questions)
    plan = facts.plan_document(
        rng, hay.unit_tokens, hay.line_start, drawn.facts, length - overhead, codec.count
    )
    return {
        "id": f"{length}-{number:03}",
        "length": length,
        "tokens": overhead + len(samples.render_tokens(plan, hay, codec)),
        "document": facts.render_text(plan, units),
        "questions": [
            {"task": q.task, "question": q.text, "answer": q.answer}
            for q in sorted(drawn.questions, key=lambda q: facts.TASKS.index(q.task))
        ],
    }


def cases(text, codec, lengths=LENGTHS, per_task=200, seed=SEED):
    hay, units = samples.Hay.build([text], codec)
    for length in lengths:
        rng = np.random.default_rng([seed, length])
        for number in range(-(-per_task // questions_per_document(length))):
            yield make_case(rng, hay, units, codec, length, number)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=pathlib.Path, default=pathlib.Path(".train/text"))
    parser.add_argument("--tokenizer", default="models/needle-32k/tokenizer.model")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".train/cases.jsonl"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--per-task", type=int, default=200)
    args = parser.parse_args()
    text = (args.text / "heldout" / f"{PACKAGE}.txt").read_text(encoding="utf-8")
    with open(args.out, "w", encoding="utf-8") as out:
        for case in cases(text, samples.Codec(args.tokenizer), args.lengths, args.per_task):
            print(json.dumps(case, ensure_ascii=False), file=out)


if __name__ == "__main__":
    main()
