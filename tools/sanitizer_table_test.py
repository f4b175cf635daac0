# SPDX-License-Identifier: Apache-2.0
"""The table of docs/verification.md from made-up lines."""

import json
import pathlib
import tempfile
import unittest

import sanitizer_table


def line(tool, program, date="2026-01-02T03:04:05Z", **fields):
    record = {"name": f"sanitizer.{tool}", "program": program, "shards": 1, "cases": 4,
              "reports": 0, "seconds": 9, "finished": True, "version": "1.2", "device": "x", "driver": "3.4",
              "commit": "abc", "date": date}
    return {**record, **fields}


def load(*records):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return sanitizer_table.load(pathlib.Path(folder))


class SanitizerTableTest(unittest.TestCase):
    def test_shards_are_added_up(self):
        text = sanitizer_table.table(load(line("memcheck", "a", shards=2),
                                           line("memcheck", "a", shards=2, seconds=11)))
        self.assertIn("| `a` | 8 cases, no report (11 s, `abc`) |  |  |  |", text)
        self.assertIn("x, driver 3.4, compute-sanitizer 1.2, 2026-01-02.", text)

    def test_the_last_run_counts(self):
        old = line("racecheck", "a", reports=2)
        new = line("racecheck", "a", date="2026-01-02T03:04:06Z")
        self.assertIn("|  | 4 cases, no report (9 s, `abc`) |", sanitizer_table.table(load(new, old)))

    def test_a_missing_shard_was_stopped(self):
        text = sanitizer_table.table(load(line("memcheck", "a", shards=2)))
        self.assertIn("4 cases, no report, **stopped** (9 s, `abc`)", text)

    def test_reports_and_stops_stand_out(self):
        text = sanitizer_table.table(load(line("initcheck", "a", reports=1, finished=False)))
        self.assertIn("4 cases, **1 report**, **stopped** (9 s, `abc`)", text)

    def test_other_lines_are_refused(self):
        for wrong in (line("leakcheck", "a"), line("memcheck", "a", cases="4"),
                      line("memcheck", "a", date="2026-01-02"), line("memcheck", "a", extra=1)):
            with self.assertRaisesRegex(ValueError, r"x\.jsonl:1: "):
                load(wrong)


if __name__ == "__main__":
    unittest.main()
