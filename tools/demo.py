#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Plants a fact in a real document and asks for it, with dense and with sparse attention.

    tools/demo.py --binary build/release/infllm [--place 0.5] [--seed 7]

The same weights answer twice. Standard library only.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
NAME = "grey fox"
QUESTION = f"What is the pass code of {NAME}?"


def plant(document, place, value):
    """The document with one more paragraph at `place` (0 to 1) of it."""
    fact = f"The pass code of {NAME} is {value}. Remember, for {NAME} the pass code is {value}."
    at = document.find("\n", int(place * (len(document) - 1)))
    at = at if at >= 0 else len(document)
    return document[:at] + "\n" + fact + document[at:], fact


def ask(options, document, sparse):
    command = [
        options.binary, "run", options.model, "--document", document, "--question", QUESTION,
        "--sparse", sparse, "--temp", "0", "--max-tokens", "16", "--json",
        "--threads", str(options.threads),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        sys.exit(f"demo: {options.binary}: {error.strerror}; `make build` builds it")
    if done.returncode != 0:
        sys.exit(f"demo: `{' '.join(command)}` ended with {done.returncode}")
    return json.loads(done.stdout)


def rows(dense, sparse):
    """(label, dense, sparse, ratio) of the table."""

    def seconds(result, name):
        return result["timings"][name] / 1e3

    def step(result, name):
        return result["timings"]["prompt_steps"][f"{name}_ms"] / 1e3

    def rest(result):
        steps = result["timings"]["prompt_steps"]
        attention = ("compress_ms", "score_ms", "select_ms", "attend_ms")
        return sum(value for name, value in steps.items() if name not in attention) / 1e3

    def share(result, name):
        return f"{100 * result['attention'][name]:.1f}%"

    def timed(label, of):
        a, b = of(dense), of(sparse)
        return (label, f"{a:.2f} s", f"{b:.2f} s", f"{a / b:.1f}x" if a > 0 and b > 0 else "")

    yield ("answer", dense["text"].strip(), sparse["text"].strip(), "")
    yield timed("reading the document", lambda r: seconds(r, "prompt_ms"))
    yield timed("writing the answer", lambda r: seconds(r, "answer_ms"))
    yield ("attended while reading", share(dense, "prompt_visible_share"),
           share(sparse, "prompt_visible_share"), "")  # fmt: skip
    yield ("attended by the answer", share(dense, "answer_visible_share"),
           share(sparse, "answer_visible_share"), "")  # fmt: skip
    for name in ("compress", "score", "select", "attend"):
        yield timed(f"  {name}", lambda r, name=name: step(r, name))
    yield timed("  the rest of the model", rest)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=str(ROOT / "build/release/infllm"))
    parser.add_argument("--model", default=str(ROOT / "models/needle-32k"))
    parser.add_argument("--document", default=str(ROOT / "examples/needle/document.txt"))
    parser.add_argument("--place", type=float, default=0.5, help="0: beginning, 1: end")
    parser.add_argument("--seed", type=int, help="of the pass code; default: another every time")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    value = str(random.Random(options.seed).randint(10_000, 99_999))
    document, fact = plant(
        pathlib.Path(options.document).read_text(encoding="utf-8"), options.place, value
    )
    print(f'planted at {options.place:.0%} of {options.document}:\n  "{fact}"')
    print(f"question: {QUESTION}\n", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(document)
        file.flush()
        sparse = ask(options, file.name, "auto")
        dense = ask(options, file.name, "off")

    print(f"{sparse['prompt_tokens']} tokens on {sparse['device']}, {sparse['threads']} threads\n")
    print(f"{'':24}{'dense':>12}{'sparse':>12}{'ratio':>8}")
    for label, a, b, ratio in rows(dense, sparse):
        print(f"{label:24}{a:>12}{b:>12}{ratio:>8}")

    reading = dense["timings"]["prompt_ms"] / sparse["timings"]["prompt_ms"]
    share = sparse["attention"]["answer_visible_share"]
    right = [result["text"].strip() == value for result in (dense, sparse)]
    print()
    if not all(right):
        wrong = " and ".join(n for n, ok in zip(("dense", "sparse"), right, strict=True) if not ok)
        print(f"The {wrong} answer is wrong; {value} was planted.")
        return 1
    print(f"With the same weights, sparse attention read the document {reading:.1f} times as fast and")
    print(f"found the fact too, while each token of the answer looked at {share:.1%} of the document.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
