# SPDX-License-Identifier: Apache-2.0
"""The table of bench/results/sanitizers/*.jsonl for docs/verification.md; render_results.py calls it.

tools/gpu_sanitize.sh appends the lines: one for each tool and program, or for each shard of one. Of
a tool and a program the lines of the last run count, all those with its date; where there are fewer
than shards, the run was stopped.
"""

import region
import results

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FIELDS = {
    "name": str, "program": str, "shards": int, "cases": int, "reports": int, "seconds": int, "finished": bool,
    "version": str, "device": str, "driver": str, "commit": str, "date": str,
}


def parse(line):
    record = results.of_fields(line, FIELDS)
    if record["name"].removeprefix("sanitizer.") not in TOOLS:
        raise ValueError(f'"name" is "{record["name"]}", expected sanitizer.{{{",".join(TOOLS)}}}')
    results.check_time(record)
    return record


def load(folder):
    """{(tool, program): the lines of its last run}"""
    return results.last_runs(
        folder, parse, lambda record: (record["name"].removeprefix("sanitizer."), record["program"]))


def cell(lines):
    """'13 cases, no report (20 s, `abc`)': the seconds of the longest shard, the commit."""
    if not lines:
        return ""
    cases, reports = sum(r["cases"] for r in lines), sum(r["reports"] for r in lines)
    found = "no report" if reports == 0 else f"**{reports} report{'s' * (reports > 1)}**"
    whole = len(lines) == lines[0]["shards"] and all(r["finished"] for r in lines)
    cut = "" if whole else ", **stopped**"
    return f"{cases} cases, {found}{cut} ({max(r['seconds'] for r in lines)} s, `{lines[0]['commit']}`)"


def table(runs):
    if not runs:
        return "No results yet.\n"
    lines = ["| program | " + " | ".join(TOOLS) + " |", "|---" * (1 + len(TOOLS)) + "|"]
    for program in sorted({program for _, program in runs}):
        cells = [cell(runs.get((tool, program), [])) for tool in TOOLS]
        lines.append(f"| `{program}` | " + " | ".join(cells) + " |")
    places = {f'{r["device"]}, driver {r["driver"]}, compute-sanitizer {r["version"]}, {r["date"][:10]}'
              for run in runs.values() for r in run}
    return "\n".join(lines) + "\n\n" + "; ".join(sorted(places)) + ".\n"


def rendered(root, so_far=None):
    return region.rendered(root / "docs/verification.md", "sanitizers", "tools/sanitizer_table.py",
                           lambda: table(load(root / "bench/results/sanitizers")), so_far)
