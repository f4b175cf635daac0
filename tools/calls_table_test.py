# SPDX-License-Identifier: Apache-2.0
"""The table of calls in docs/python.md from made-up lines."""

import json
import pathlib
import tempfile
import unittest

import calls_table


def line(call, gradients="none", us=1.0, **fields):
    record = {"name": "python.call", "call": call, "gradients": gradients, "us": us, "device": "Some GPU",
              "commit": "abc", "date": "2026-01-02"}
    return json.dumps({**record, **fields})


def load(*lines):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return calls_table.load(path)


class CallsTableTest(unittest.TestCase):
    def test_a_row_a_call_and_the_last_line_counts(self):
        text = calls_table.tables(load(line("f", us=9.0), line("f", "taken", 20.4), line("f", us=3.0), line("g")))
        self.assertIn("| f | 3 |  | 20 |\n| g | 1 |  |  |\n\nBeside Some GPU, commit `abc`.\n", text)

    def test_a_table_a_device(self):
        text = calls_table.tables(load(line("f"), line("f", device="Other GPU")))
        self.assertIn("Beside Some GPU", text)
        self.assertIn("Beside Other GPU", text)

    def test_lines_that_do_not_fit_are_named(self):
        for bad, message in ((line("f", us="1"), "expected float"), (line("f", us=-1.0), "positive"),
                             (line("f", "some"), "expected none, kept, taken"), (line("f", size=1), "size"),
                             (line("f", name="call"), "expected python.call"), ("[]", "expected an object"),
                             (line("f", us=float("nan")), "positive"), (line("f", note=1), "expected str")):
            with self.assertRaisesRegex(ValueError, f"a.jsonl:1: .*{message}"):
                load(bad)

    def test_nothing_yet(self):
        self.assertEqual(calls_table.tables({}), "No results yet.\n")


if __name__ == "__main__":
    unittest.main()
