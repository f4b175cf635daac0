# SPDX-License-Identifier: Apache-2.0
"""Draws the losses of runs as an SVG picture, without any library.

python3 examples/adapt/plot.py --out docs/adapt-text-loss.svg examples/adapt/training_log.jsonl
python3 examples/adapt/plot.py --field answer_loss --out loss.svg .train/adapt/run/*/log.jsonl
"""

import argparse
import json
import math
import pathlib

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 56, 130, 40, 44
COLOURS = ["#555555", "#b5442e", "#1f6f8b", "#7a6a1f", "#5b3f8c"]
LABELS = {"dense": "(a) dense", "sparse": "(b) sparse", "aligned": "(d) sparse, taught",
          "taught": "(e) dense, taught"}  # fmt: skip
TITLES = {
    "text_loss": "Loss of the text, single steps",
    "answer_loss": "Loss of the answers, single steps",
    "wrong": "Share of answer tokens that are wrong, all steps",
}


def smooth(points, window=8):
    """Running means over `window` points, from the first that has half of them on."""
    return [
        (x, sum(y for _, y in points[max(0, i - window + 1) : i + 1]) / min(window, i + 1))
        for i, (x, _) in enumerate(points)
        if 2 * (i + 1) >= min(window, len(points))
    ]


def curves(paths, field):
    """{label: [(million tokens, loss)]}: continued runs begin where the first one ended.

    Of several seeds the first.
    """
    runs = {}
    records = [json.loads(x) for path in paths for x in path.read_text(encoding="utf-8").splitlines()]
    seed = min((r["seed"] for r in records if r["phase"] != "pretrain"), default=None)
    for record in records:
        if record["phase"] == "pretrain" or record["seed"] == seed:
            name = "short, dense" if record["phase"] == "pretrain" else LABELS[record["arm"]]
            y = 1 - record["answer_tokens_right"] if field == "wrong" else record[field]
            runs.setdefault(name, []).append((record["tokens"] / 1e6, y))
    start = max((x for x, _ in runs.get("short, dense", [])), default=0.0)
    return {
        name: smooth([(x + (start if name != "short, dense" else 0), y) for x, y in points])
        for name, points in sorted(runs.items(), key=lambda item: item[0] != "short, dense")
    }


def chart(title, lines):
    """lines: {label: [(million tokens, loss)]}; losses on a logarithmic axis."""
    every = [point for line in lines.values() for point in line]
    top = max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    low, high = math.log(max(low, 1e-3) * 0.9), math.log(high * 1.1)

    def x(value):
        return LEFT + (WIDTH - LEFT - RIGHT) * value / top

    def y(value):
        share = (math.log(max(value, 1e-3)) - low) / (high - low)
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           'font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           f'<text x="{LEFT}" y="20" font-size="14">{title}</text>']  # fmt: skip
    for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 4, 6, 8):
        if low <= math.log(tick) <= high:
            out.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
            out.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    step = 10 ** math.floor(math.log10(top)) if top > 0 else 1
    step = step / 2 if top / step < 3 else step
    for i in range(int(top / step) + 1):
        out.append(f'<text x="{x(i * step):.1f}" y="{HEIGHT - BOTTOM + 18}" '
                   f'text-anchor="middle">{i * step:g}</text>')  # fmt: skip
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" '
               'text-anchor="middle">million tokens</text>')  # fmt: skip
    ends = []
    for colour, (label, line) in zip(COLOURS, lines.items()):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        ends.append([y(line[-1][1]) + 4, x(line[-1][0]) + 8, colour, label])
    ends.sort()
    for above, label in zip(ends, ends[1:]):  # labels that would lie on one another
        label[0] = max(label[0], above[0] + 14)
    out += [f'<text x="{a:.1f}" y="{b:.1f}" fill="{c}">{d}</text>' for b, a, c, d in ends]
    return "\n".join(out + ["</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--field", default="text_loss", choices=tuple(TITLES))
    parser.add_argument("logs", type=pathlib.Path, nargs="+")
    args = parser.parse_args()
    picture = chart(f"{TITLES[args.field]}, means of 8", curves(args.logs, args.field))
    args.out.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
