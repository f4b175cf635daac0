# SPDX-License-Identifier: Apache-2.0
"""Records of examples/adapt read back, and the ratios of what runs answer right, with their errors."""

import json
import math
import statistics

TASKS = {
    "single_1": "S1", "single_2": "S2", "single_3": "S3", "multi_key_1": "MK1",
    "multi_key_2": "MK2", "multi_key_3": "MK3", "multi_value": "MV", "multi_query": "MQ",
    "variables": "VT", "common": "CWE", "frequent": "FWE",
}


def load(folder):
    """All records; of several with one key the last."""
    latest = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            changing = ("date", "correct", "total", "each", "nll", "texts", "ms", "ms_low", "ms_high",
                        "ms_one", "tokens_per_second", "mfu", "memory_gb", "error", "bound",
                        "steps", "seconds", "commit", "driver")
            if record["name"] == "adapt.run":
                changing += ("tokens",)
            latest[tuple(sorted((k, str(v)) for k, v in record.items() if k not in changing))] = record
    return list(latest.values())


class Scores:
    """Shares of right items: score(arm, attention, length[, task]), the mean of all seeds.

    without: tasks that are left out
    """

    def __init__(self, records, without=()):
        self.names = [task for task in TASKS if task not in without]
        self.cells = {}  # -> {seed: shares of right items of every case}
        tasks = [r for r in records if r["name"] == "adapt.task"]
        self.blocks = max((r["blocks"] for r in tasks), default=0)  # what the runs were made for
        for r in tasks:
            if r["blocks"] == self.blocks:
                cell = self.cells.setdefault((r["arm"], r["attention"], r["length"], r["task"]), {})
                cell[r["seed"]] = [right * len(r["each"]) / r["total"] for right in r["each"]]

    def __call__(self, arm, attention, length, task=None):
        if task:
            cell = self.cells.get((arm, attention, length, task), {})
            shares = [share for each in cell.values() for share in each]
            return 100 * sum(shares) / len(shares) if shares else None
        each = [self(arm, attention, length, t) for t in self.names]
        return None if None in each else sum(each) / len(each)

    def error(self, arm, attention, length):
        """Standard error of the mean of the tasks, in points."""
        return self.ratio((arm, attention), None, length)[1]

    def pairs(self, first, second, length, task):
        """(first, second) of every seed that both have, of each case that all these have. The short
        run that several seeds begin with has the first one's number. second None: 1."""
        above = self.cells[*first, length, task]
        below = self.cells[*second, length, task] if second else {}
        pairs = []
        for seed, shares in above.items():
            other = below.get(seed, []) if second else [1.0] * len(shares)
            if second and second[0] == "short":
                other = below[max((s for s in below if s <= seed), default=min(below))]
            if other:
                pairs.append(zip(shares, other))
        return list(zip(*pairs))

    def ratio(self, first, second, length):
        """first / second of (arm, attention) in percent, and its standard error, case by case.

        With R = A / B the error of A - R B, divided by B: cases that both get wrong, or right, add
        little. Only cases that both have count; what several seeds say of one case is one number.
        second None: B = 1.
        """
        if None in (self(*reading, length) for reading in (first, second) if reading):
            return None, None
        tasks = [self.pairs(first, second, length, task) for task in self.names]
        if not all(tasks):
            return None, None
        top, bottom = (statistics.mean(statistics.mean(pair[i] for case in task for pair in case)
                                       for task in tasks) for i in (0, 1))
        if not bottom:
            return None, None
        variance = 0.0
        for task in tasks:
            rest = [statistics.mean(a - (top / bottom * b if second else 0.0) for a, b in case)
                    for case in task]
            variance += statistics.variance(rest) / len(rest) if len(rest) > 1 else 0.0
        return 100 * top / bottom, 100 * math.sqrt(variance) / len(self.names) / bottom

    def lengths(self):
        return sorted({length for _, _, length, _ in self.cells})


def task_records(records):
    return [r for r in records if r["name"] == "adapt.task"]


def seeds_of_all(records):
    """The seeds that every arm has been continued with; all seeds where there is none."""
    seeds = {}
    for r in task_records(records):
        seeds.setdefault(r["arm"], set()).add(r["seed"])
    return set.intersection(*seeds.values()) or set().union(*seeds.values()) if seeds else set()


def of_seeds(records, seeds):
    return [r for r in records if r.get("seed") in seeds]
