#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes every number of the documentation from bench/results/*.jsonl.

    tools/render_results.py [--root FOLDER]            write
    tools/render_results.py [--root FOLDER] --check    fail when a file would change

docs/performance.md holds all measurements, docs/*.svg the pictures, README.md the few that matter most:
between marks, as on the pages of the other tables.
"""

import argparse
import pathlib
import sys

import calls_table
import chart
import gpu_tests_table
import region
import results
import sanitizer_table
import training_tables

WRITER = "tools/render_results.py"
README_MARKS = ("numbers", WRITER)
PAGE_MARKS = ("measurements", WRITER)


def number(value):
    """Three significant digits, thousands in full."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if value >= 1000:
        return f"{value:,.0f}"
    digits = f"{value:.3g}"
    return digits if "e" not in digits else f"{value:.6f}"


def duration(milliseconds):
    if milliseconds >= 1000:
        return f"{number(milliseconds / 1000)} s"
    return f"{number(milliseconds)} ms"


def bound(record):
    """Marks a peer that was stopped before it had finished."""
    return "> " if record.get("peer_unfinished") else ""


def percent(value):
    return "" if value is None else f"{100 * value:.1f} %"


def tokens_label(tokens):
    return chart.tokens_label(tokens) if isinstance(tokens, int) else ""


def length_label(shape):
    """'32K', or '64 after 32K' where the cache held tokens already."""
    label = tokens_label(shape.get("tokens"))
    return f'{label} after {tokens_label(shape["depth"])}' if shape.get("depth") else label


def table(head, rows):
    """A Markdown table; columns that are empty in every row are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = ["| " + " | ".join(head[i] for i in kept) + " |", "|" + "---|" * len(kept)]
    lines += ["| " + " | ".join(row[i] for i in kept) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def shape_label(shape):
    """'minicpm4-0.5b, bf16, sparse, 2 threads', '16/2 heads, d 64': all but the lengths."""
    bare = ("model", "matrix", "weights", "dtype", "attention")
    parts = [str(shape[field]) for field in bare if field in shape]
    if "model" not in shape and "heads_q" in shape and "heads_kv" in shape:
        parts.append(f'{shape["heads_q"]}/{shape["heads_kv"]} heads')
    if "model" not in shape and "head_dim" in shape:
        parts.append(f'd {shape["head_dim"]}')
    if shape.get("batch", 1) != 1:
        parts.append(f'batch {shape["batch"]}')
    named = {*bare, "heads_q", "heads_kv", "head_dim", "batch", "tokens", "depth", "blocks",
             "threads"}
    parts += [f"{field} {shape[field]}" for field in sorted(shape) if field not in named]
    if "threads" in shape:
        parts.append(f'{shape["threads"]} threads')
    return ", ".join(parts)


def sort_key(record):
    shape = record["shape"]
    return (record["name"], shape_label(shape), record["backend"],
            shape.get("depth", 0) + shape.get("tokens", 0), shape.get("blocks", 0),
            record.get("input", ""), record.get("peer", ""))


def times(record):
    if record.get("ms_low", record["ms"]) < record.get("ms_high", record["ms"]):
        return f'{number(record["ms"])} ({number(record["ms_low"])}-{number(record["ms_high"])})'
    return number(record["ms"])


def measurement_row(record):
    shape = record["shape"]
    return [f'`{record["name"]}`', record["backend"], shape_label(shape),
            length_label(shape), str(shape.get("blocks", "")), percent(record.get("visible_share")),
            record.get("input", ""), times(record), number(record.get("tflops")),
            number(record.get("gbps")), percent(record.get("roofline")), record.get("peer", ""),
            bound(record) + number(record.get("peer_ms")),
            bound(record) + number(record.get("ratio")),
            f'`{record["commit"][:9]}`', record.get("note", "")]


STEPS = ["compress", "score", "select", "attend", "projections", "mlp", "head"]


def step_row(record):
    """Where the milliseconds of one run went, step by step."""
    steps = {name.removesuffix("_ms"): value for name, value in record["steps_ms"].items()}
    rest = sum(value for name, value in steps.items() if name not in STEPS)
    shape = record["shape"]
    return [f'`{record["name"]}`', shape_label(shape), length_label(shape),
            *(number(steps.get(name)) for name in STEPS), number(rest)]


STEP_HEAD = ["what", "shape", "tokens", *STEPS, "rest"]
MEASUREMENT_HEAD = ["what", "backend", "shape", "tokens", "blocks", "visible", "input",
                    "ms", "TFLOP/s",
                    "GB/s", "of the limit", "peer", "peer ms", "ratio", "commit", "note"]


def device_label(records):
    drivers = sorted({r["driver"] for r in records if r.get("driver")})
    dates = sorted({r["date"][:10] for r in records})
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f'{records[0]["device"]}' + "".join(f", {d}" for d in drivers) + f" ({days})"


def versions(records):
    """'Peers: cudnn and flash2 (PyTorch 2.11.0), infllm_v2 (0.1.0, f908e73).', or nothing."""
    peers = {}
    for r in records:
        if "peer_version" in r:
            peers.setdefault(r["peer_version"], set()).add(r["peer"])
    of = sorted(f'{" and ".join(sorted(names))} ({version})' for version, names in peers.items())
    return f'Peers: {", ".join(of)}.\n' if of else ""


def by_device(measurements):
    devices = {}
    for record in sorted(measurements, key=sort_key):
        devices.setdefault(record["device"], []).append(record)
    return dict(sorted(devices.items()))


def families(records):
    """The records by the part of the name before the dot."""
    groups = {}
    for record in records:
        groups.setdefault(record["name"].split(".")[0], []).append(record)
    return groups


ALL_TASKS = "all tasks"


def evaluation_rows(evaluations):
    """One row for each model, task and length, all tasks together last; dense beside sparse."""
    cells = {}
    for r in evaluations:
        by = ", ".join(part for part in (r["backend"], r.get("dtype")) if part)
        for task in (r["task"], ALL_TASKS):
            cell = cells.setdefault((r.get("model", ""), by, task, r["length"]), {})
            old = cell.get(r["attention"], (0, 0, []))
            shares = old[2] + ([r["visible_share"]] if "visible_share" in r else [])
            cell[r["attention"]] = (old[0] + r["correct"], old[1] + r["total"], shares)
    for group in sorted(cells, key=lambda k: (k[0], k[1], k[2] == ALL_TASKS, k[2], k[3])):
        model, by, task, length = group
        cell = cells[group]
        dense, sparse = cell.get("dense"), cell.get("sparse")
        shares = sparse[2] if sparse else []
        kept = sparse[0] / sparse[1] * dense[1] / dense[0] if dense and sparse and dense[0] else None
        yield [model, by, task, tokens_label(length), share(dense), share(sparse), percent(kept),
               percent(sum(shares) / len(shares)) if shares else "",
               str((dense or sparse)[1])]


EVALUATION_HEAD = ["checkpoint", "run by", "task", "tokens", "dense", "sparse", "sparse of dense",
                   "visible share", "samples"]


def share(counts):
    return percent(counts[0] / counts[1]) if counts else ""


# What a picture shows as dense attention: the best of these that ran beside the sparse one.
DENSE_PEERS = ("cudnn", "dense")
PUBLISHED = "infllm_v2"  # the peer that the published kernels are


def kind_of(record):
    """What the records of one picture have in common."""
    return (record["name"], record["device"], record["backend"], shape_label(record["shape"]),
            record.get("input", ""))


def dense_pairs(measurements):
    """{(device, backend, shape without lengths, input): [record with a dense peer, ...]}"""
    groups = {}
    for r in sorted(measurements, key=sort_key):
        if (r["name"] == "attention.forward" and r.get("peer") in DENSE_PEERS
                and "tokens" in r["shape"]):
            groups.setdefault(kind_of(r)[1:], {}).setdefault(r["peer"], []).append(r)
    kept = {}
    for group, by_peer in groups.items():
        records = next(by_peer[peer] for peer in DENSE_PEERS if peer in by_peer)
        if len(records) > 1:
            kept[group] = records
    return kept


def lines_of(records, measurements):
    """The picture's lines: dense, the published kernels where known, ours, what the limit allows."""
    peer = records[0]["peer"]
    lines = {"dense" if peer == "dense" else f"dense ({peer})":
             [(r["shape"]["tokens"], r["peer_ms"]) for r in records]}
    published = [(r["shape"]["tokens"], r["peer_ms"]) for r in measurements
                 if r.get("peer") == PUBLISHED and kind_of(r) == kind_of(records[0])]
    if published:
        lines["published kernels"] = published
    lines["sparse" if peer == "dense" else "infllm.cpp"] = [
        (r["shape"]["tokens"], r["ms"]) for r in records]
    # The roofline is the share of the limit that was reached, so the limit's time is that share.
    floor = [(r["shape"]["tokens"], r["ms"] * r["roofline"]) for r in records if "roofline" in r]
    if peer != "dense" and floor:
        lines["floor"] = floor
    return lines


def charts(measurements):
    """{file name: (title, SVG)}: time against length."""
    drawn = {}
    for i, (group, records) in enumerate(dense_pairs(measurements).items()):
        device, backend, shape, kind = group
        title = f"One attention layer, {shape}, {backend} on {device}" + (f", {kind}" if kind else "")
        drawn[f"attention-time-{i + 1}.svg"] = (
            title, chart.line_chart(title, lines_of(records, measurements)))
    return drawn


def performance(measurements, evaluations):
    out = []
    for name, (title, _) in charts(measurements).items():
        out.append(f"![{title}]({name})\n")
    for records in by_device(measurements).values():
        out.append(f"## {device_label(records)}\n")
        if said := versions(records):
            out.append(said)
        for family, members in families(records).items():
            out += [f"### {family}\n", table(MEASUREMENT_HEAD, [measurement_row(r) for r in members])]
            steps = [step_row(r) for r in members if "steps_ms" in r]
            if steps:
                out += [f"Milliseconds of each step, {family}:\n", table(STEP_HEAD, steps)]
    if evaluations:
        out += ["## Answers\n", table(EVALUATION_HEAD, list(evaluation_rows(evaluations)))]
    if not measurements and not evaluations:
        out.append("No results yet.\n")
    return "\n".join(out)


HEADLINES = {
    "attention.forward": "one attention layer",
    "attention.forward_backward": "one attention layer, forward and backward",
    "model.prefill": "a model reading",
    "model.decode": "a model writing",
}


# What the headlines show where there are several inputs: attention layers whose neighbours share 80%
# of what they choose, models whose tokens are all different.
HEADLINE_INPUT = {"attention.forward": "correlated-0.8",
                  "attention.forward_backward": "correlated-0.8", "model.prefill": "random"}


def longest(measurements):
    """Of each name, device, shape and peer the record with most tokens, if it has a peer."""
    best = {}
    for r in sorted(measurements, key=sort_key):
        is_shown = "peer" in r and r["name"] in HEADLINES
        if is_shown and r.get("input") in (None, HEADLINE_INPUT.get(r["name"], r.get("input"))):
            best[r["device"], r["name"], shape_label(r["shape"]), r["peer"]] = r
    return best.values()


def writing(measurements):
    """A sentence for each model on a device: tokens a second behind long contexts."""
    speeds = {}
    for r in sorted(measurements, key=lambda r: r["shape"].get("depth", 0)):
        shape = r["shape"]
        written = r["name"] == "model.decode" and shape.get("depth")
        if written and shape.get("attention") == "sparse" and {"model", "weights"} <= shape.keys():
            behind = tokens_label(shape["depth"])
            if behind.isdigit():
                behind = f"{int(behind):,}"
            speeds.setdefault((r["device"], shape["model"], shape["weights"]), []).append(
                f'{number(1000 * shape["tokens"] / r["ms"])} behind {behind}')
    return "".join(f"Tokens a second that a model of the shape {model}, {weights}, writes on "
                   f'{device}: {", ".join(of)} tokens.\n'
                   for (device, model, weights), of in speeds.items())


PEER_NAMES = {"cudnn": "cuDNN", "flash2": "FlashAttention-2", PUBLISHED: "published kernels"}


def readme_numbers(measurements, evaluations):
    rows = [[HEADLINES[r["name"]], r["device"], shape_label(r["shape"]), length_label(r["shape"]),
             duration(r["ms"]), f'{bound(r)}{duration(r["peer_ms"])} '
             f'({PEER_NAMES.get(r["peer"], r["peer"])})',
             f'{bound(r)}{number(r["ratio"])}x'] for r in longest(measurements)]
    out = [table(["what", "on", "shape", "tokens", "infllm.cpp", "beside", "ratio"],
                 rows)] if rows else []
    if sentences := writing(measurements):
        out.append(sentences)
    # The engine's own answers, where there are some; the trainer's are in docs/performance.md.
    own = [r for r in evaluations if r["backend"] != "pytorch"]
    totals = [row for row in evaluation_rows(own or evaluations) if row[2] == ALL_TASKS]
    if totals:
        out.append(table(EVALUATION_HEAD, totals))
    if rows:
        names = " and ".join(device_label(records) for records in by_device(measurements).values())
        out.append(f"Measured on {names}. All numbers: [docs/performance.md](docs/performance.md).\n")
    return "\n".join(out) or "No results yet.\n"


def rendered(root):
    """{path: text} of every file that the results determine."""
    measurements, evaluations = results.load(root / "bench/results")
    files = {root / "docs" / name: svg for name, (_, svg) in charts(measurements).items()}
    files.update(region.rendered(root / "docs/performance.md", *PAGE_MARKS,
                                 lambda: performance(measurements, evaluations)))
    files.update(region.rendered(
        root / "README.md", *README_MARKS,
        lambda: readme_numbers(measurements, evaluations) + training_tables.summary(root)))
    for tables in (training_tables, gpu_tests_table, sanitizer_table, calls_table):
        files.update(tables.rendered(root, files))
    return files


def stale(files):
    return [path for path, text in files.items()
            if not path.is_file() or path.read_text(encoding="utf-8") != text]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).parents[1])
    parser.add_argument("--check", action="store_true", help="fail when a file would change")
    options = parser.parse_args(arguments)
    try:
        files = rendered(options.root)
    except ValueError as error:
        print(f"render_results: {error}", file=sys.stderr)
        return 1
    changed = stale(files)
    if options.check:
        for path in changed:
            print(f"render_results: {path.relative_to(options.root)} differs from bench/results; run `make render`",
                  file=sys.stderr)
        return 1 if changed else 0
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path], encoding="utf-8")
        print(f"wrote {path.relative_to(options.root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
