# SPDX-License-Identifier: Apache-2.0
"""The table of bench/results/gpu-tests/*.jsonl for docs/verification.md; render_results.py calls it.

tools/gpu_test.sh appends the lines: one for each program or file of tests, or for each shard of one.
Of a program the lines of the last run count, all those with its date.
"""

import region
import results

FIELDS = {
    "name": str, "program": str, "shards": int, "passed": int, "skipped": int, "failed": int, "ok": bool,
    "seconds": int, "device": str, "driver": str, "commit": str, "date": str,
}


def parse(line):
    record = results.of_fields(line, FIELDS)
    if record["name"] != "test.gpu":
        raise ValueError(f'"name" is "{record["name"]}", expected test.gpu')
    results.check_time(record)
    return record


def load(folder):
    """{program: the lines of its last run}"""
    return results.last_runs(folder, parse, lambda record: record["program"])


def row(program, lines):
    """A run that is not ok although no test failed was stopped, or crashed."""
    passed, skipped, failed = (sum(r[key] for r in lines) for key in ("passed", "skipped", "failed"))
    found = f"**{failed}**" if failed else "0"
    if len(lines) != lines[0]["shards"] or (not failed and not all(r["ok"] for r in lines)):
        found += ", **stopped**"
    return (f"| `{program}` | {passed} | {skipped or ''} | {found} | {max(r['seconds'] for r in lines)} "
            f"| `{lines[0]['commit']}` |")


def table(runs):
    if not runs:
        return "No results yet.\n"
    lines = ["| program | passed | skipped | failed | s | commit |", "|---" * 6 + "|"]
    lines += [row(program, runs[program]) for program in sorted(runs)]
    places = {f'{r["device"]}, driver {r["driver"]}, {r["date"][:10]}' for run in runs.values() for r in run}
    return "\n".join(lines) + "\n\n" + "; ".join(sorted(places)) + ".\n"


def rendered(root, so_far=None):
    return region.rendered(root / "docs/verification.md", "gpu-tests", "tools/gpu_tests_table.py",
                           lambda: table(load(root / "bench/results/gpu-tests")), so_far)
