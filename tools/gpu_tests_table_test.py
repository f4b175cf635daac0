# SPDX-License-Identifier: Apache-2.0
"""The table of docs/verification.md from made-up lines."""

import json
import pathlib
import tempfile
import unittest

import gpu_tests_table


def line(program, date="2026-01-02T03:04:05Z", **fields):
    record = {"name": "test.gpu", "program": program, "shards": 1, "passed": 4, "skipped": 0, "failed": 0,
              "ok": True, "seconds": 9, "device": "x", "driver": "3.4", "commit": "abc", "date": date}
    return {**record, **fields}


def table(*records):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        return gpu_tests_table.table(gpu_tests_table.load(pathlib.Path(folder)))


class GpuTestsTableTest(unittest.TestCase):
    def test_shards_are_added_up(self):
        text = table(line("a", shards=2, skipped=1), line("a", shards=2, seconds=11))
        self.assertIn("| `a` | 8 | 1 | 0 | 11 | `abc` |", text)
        self.assertIn("x, driver 3.4, 2026-01-02.", text)

    def test_the_last_run_counts(self):
        old, new = line("a", failed=2, ok=False), line("a", date="2026-01-02T03:04:06Z")
        self.assertIn("| `a` | 4 |  | 0 | 9 | `abc` |", table(new, old))

    def test_what_did_not_end_stands_out(self):
        self.assertIn("| 0, **stopped** |", table(line("a", ok=False)))
        self.assertIn("| 0, **stopped** |", table(line("a", shards=2)))
        self.assertIn("| **1** |", table(line("a", failed=1, ok=False)))

    def test_other_lines_are_refused(self):
        for wrong in (line("a", name="test.cpu"), line("a", passed="4"), line("a", date="2026-01-02")):
            with self.assertRaisesRegex(ValueError, r"x\.jsonl:1: "):
                table(wrong)


if __name__ == "__main__":
    unittest.main()
