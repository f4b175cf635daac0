# SPDX-License-Identifier: Apache-2.0
"""The table of bench/results/calls/*.jsonl for docs/python.md; render_results.py calls it.

bench/python_calls.py appends the lines; of several for one call on one device the last counts.
"""

import region
import results

GRADIENTS = {"none": "without gradients", "kept": "forward, gradients wanted",
             "taken": "forward and backward"}
FIELDS = {"name": str, "call": str, "gradients": str, "us": float, "device": str, "commit": str, "date": str}
OPTIONAL = {"driver": str, "note": str}


def parse(line):
    record = results.of_fields(line, FIELDS, OPTIONAL)
    if record["name"] != "python.call":
        raise ValueError(f'"name" is "{record["name"]}", expected python.call')
    if record["gradients"] not in GRADIENTS:
        raise ValueError(f'"gradients" is "{record["gradients"]}", expected {", ".join(GRADIENTS)}')
    if not record["us"] > 0:  # nor NaN
        raise ValueError(f'"us" is {record["us"]}, expected a positive number')
    return record


def load(folder):
    """{device: {call: {gradients: record}}}, in the order of the files."""
    devices = {}
    for record in results.records_of(folder, parse):
        calls = devices.setdefault(record["device"], {})
        calls.setdefault(record["call"], {})[record["gradients"]] = record
    return devices


def tables(devices):
    out = []
    for device, calls in devices.items():
        lines = ["| microseconds of the host | " + " | ".join(GRADIENTS.values()) + " |",
                 "|---" * (1 + len(GRADIENTS)) + "|"]
        for call, times in calls.items():
            cells = [f'{times[g]["us"]:.0f}' if g in times else "" for g in GRADIENTS]
            lines.append(f"| {call} | " + " | ".join(cells) + " |")
        commits = sorted({f'`{r["commit"]}`' for times in calls.values() for r in times.values()})
        out.append("\n".join(lines) + f"\n\nBeside {device}, commit {', '.join(commits)}.\n")
    return "\n".join(out) or "No results yet.\n"


def rendered(root, so_far=None):
    return region.rendered(root / "docs/python.md", "calls", "tools/calls_table.py",
                           lambda: tables(load(root / "bench/results/calls")), so_far)
