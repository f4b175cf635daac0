# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/training.md from made-up records."""

import json
import math
import pathlib
import tempfile
import unittest

import training_tables


def task(arm, attention, name, correct, blocks=96, seed=1):
    return {"name": "adapt.task", "model": "h200", "arm": arm, "seed": seed, "device": "x",
            "date": "2026-01-01", "blocks": blocks, "task": name, "length": 32768,
            "attention": attention, "correct": correct, "total": 10,
            "each": [1] * correct + [0] * (10 - correct)}


def all_tasks(arm, attention, correct, blocks=96, seed=1):
    return [task(arm, attention, name, correct, blocks, seed) for name in training_tables.TASKS]


class TrainingTablesTest(unittest.TestCase):
    def test_ratio_is_that_of_the_means(self):
        records = all_tasks("dense", "dense", 8) + all_tasks("sparse", "sparse", 6)
        text = training_tables.tables(records)
        # a - 0.75 b is 1/4, -3/4 and 0 in 6, 2 and 2 of ten cases: variance 1/6; b's: 8/45.
        error = 100 * math.sqrt(11 / 6 / 10) / 11 / 0.8
        base = 100 * math.sqrt(11 * 8 / 45 / 10) / 11
        self.assertIn(f"| (b) sparse / (a) dense | 75.0 ± {error:.1f} % |\n", text)
        self.assertIn(f"| 32K | 80.0 | 60.0 | {base:.1f} |", text)

    def test_a_ratio_is_of_the_cases_that_both_have(self):
        few = [dict(r, each=r["each"][:6], total=6) for r in all_tasks("short", "dense", 8)]
        score = training_tables.Scores(all_tasks("dense", "dense", 8) + few)
        ratio, error = score.ratio(("dense", "dense"), ("short", "dense"), 32768)
        self.assertEqual((100.0, 0.0), (round(ratio, 9), round(error, 9)))

    def test_seeds_of_one_case_are_one_number(self):
        records = [r for seed, dense, taught in ((1, 8, 6), (2, 10, 8)) for r in
                   all_tasks("dense", "dense", dense, seed=seed) + all_tasks("aligned", "sparse", taught, seed=seed)]
        score = training_tables.Scores(records)
        ratio, error = score.ratio(("aligned", "sparse"), ("dense", "dense"), 32768)
        # a - 7/9 b, mean of both seeds: 2/9 in six cases, -5/18 in two and -7/18 in two.
        variance = (6 * 4 / 81 + 2 * 25 / 324 + 2 * 49 / 324) / 9
        self.assertAlmostEqual(100 * 7 / 9, ratio)
        self.assertAlmostEqual(100 * math.sqrt(variance / 10 / 11) / 0.9, error)
        text = training_tables.tables(records)
        self.assertIn("| ratio | tokens | seed 1 | seed 2 | mean of the seeds |", text)
        self.assertRegex(text, r"\| \(d\) sparse / \(a\) dense \| 32K \| 75\.0 ± \d\.\d % \| 80\.0 ± \d\.\d % "
                               r"\| 77\.5 ± 2\.5 % \|")

    def test_a_ratio_is_of_the_seeds_that_both_have(self):
        records = all_tasks("dense", "dense", 4, seed=1) + all_tasks("aligned", "sparse", 4, seed=1)
        records += all_tasks("aligned", "sparse", 9, seed=2) + all_tasks("taught", "dense", 10, seed=2)
        score = training_tables.Scores(records)
        ratios = {name: score.ratio(*pair, 32768)[0] for name, pair in training_tables.KEPT.items()}
        self.assertAlmostEqual(100.0, ratios["(d) sparse / (a) dense"])
        self.assertAlmostEqual(90.0, ratios["(d) sparse / (e) dense"])
        self.assertIsNone(ratios["(e) dense / (a) dense"])

    def test_arms_stand_beside_one_another_where_all_have_a_seed(self):
        records = all_tasks("dense", "dense", 4, seed=1) + all_tasks("aligned", "sparse", 5, seed=1)
        records += all_tasks("dense", "dense", 8, seed=2)
        text = training_tables.tables(records)
        self.assertIn("### Mean of the tasks at every length, seed 1\n", text)
        self.assertIn("| 32K | 40.0 | 50.0 |", text)
        self.assertEqual({1, 2}, training_tables.seeds_of_all(records[:11] + records[22:]))

    def test_the_run_before_all_seeds_stands_beside_each(self):
        records = all_tasks("short", "dense", 10)
        records += [r for seed in (1, 2) for r in all_tasks("dense", "dense", 4 + 4 * (seed - 1), seed=seed)]
        ratio, _ = training_tables.Scores(records).ratio(("dense", "dense"), ("short", "dense"), 32768)
        self.assertAlmostEqual(60.0, ratio)

    def test_the_summary_has_the_fair_ratio_first(self):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            self.assertEqual("", training_tables.summary(root))
            (root / "bench/results/training").mkdir(parents=True)
            records = [r for arm, attention, right in (
                ("dense", "dense", 8), ("sparse", "sparse", 4), ("taught", "dense", 9),
                ("aligned", "dense", 10), ("aligned", "sparse", 9)) for r in all_tasks(arm, attention, right)]
            (root / "bench/results/training/a.jsonl").write_text(
                "".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
            text = training_tables.summary(root)
            self.assertIn("it answers 100.0 ± 0.0 % at 32K of what it does continued and read dense", text)
            self.assertIn("and 90.0 ± ", text)
            self.assertIn("that is 50.0 ± ", text)

    def test_a_task_can_be_left_out(self):
        records = [r for seed in (1, 2) for arm, attention in (("taught", "dense"), ("aligned", "sparse"))
                   for r in all_tasks(arm, attention, 8, seed=seed)]
        uneven = {"taught", "variables", 1}
        records = [dict(r, correct=0, each=[0] * 10) if uneven == {r["arm"], r["task"], r["seed"]} else r
                   for r in records]
        text = training_tables.tables(records)
        self.assertRegex(text, r"\| \(d\) sparse / \(e\) dense \| 32K \| 110\.0 ± \d\.\d % \| 100\.0 ± 0\.0 % "
                               r"\| 105\.0 ± 5\.0 % \|")
        self.assertIn("| (d) sparse / (e) dense, without VT | 32K | 100.0 ± 0.0 % | 100.0 ± 0.0 % |", text)

    def test_the_first_run_stands_apart(self):
        first = all_tasks("dense", "dense", 8) + all_tasks("sparse", "sparse", 4)
        records = all_tasks("dense", "dense", 10) + [dict(r, model=training_tables.FIRST) for r in first]
        main, _, after = training_tables.tables(records).partition("### The first run")
        self.assertIn("| 100.0 |", main)
        self.assertNotIn("50.0 ±", main)
        self.assertIn("| 50.0 ±", after)

    def test_losses_are_of_the_steps_that_all_arms_have(self):
        log = [{"phase": "adapt", "arm": arm, "step": step, "length": 4096, "answer_loss": loss * (step + 1),
                "seed": 1}
               for arm, loss in (("dense", 0.1), ("sparse", 0.2)) for step in range(9)]
        log += [dict(log[0], step=0, answer_loss=0.0, arm="aligned")]  # text alone: nothing to answer
        log += [dict(log[0], arm="aligned", step=step, answer_loss=1.0) for step in (1, 4, 8)]
        self.assertIn("| 4K | 1, 1, 1 | 0.20 -> 0.50 -> 0.90 | 0.40 -> 1.00 -> 1.80 | 1.00 -> 1.00 -> 1.00 |",
                      training_tables.log_table(log))

    def test_fewer_blocks_stand_apart(self):
        records = all_tasks("aligned", "dense", 8) + all_tasks("aligned", "sparse", 4, blocks=40)
        text = training_tables.tables(records)
        self.assertIn("| (d) sparse, selection taught | 40 | 7.8 % | 40.0 | 50.0 % |", text)
        self.assertNotIn("| (d) sparse, selection taught | sparse |", text)

    def test_an_unfinished_reading_has_no_mean(self):
        records = all_tasks("dense", "dense", 8)[:-1]
        self.assertIsNone(training_tables.Scores(records)("dense", "dense", 32768))

    def test_the_last_of_equal_records_counts(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "a.jsonl"
            old, new = task("dense", "dense", "common", 1), task("dense", "dense", "common", 2)
            path.write_text(json.dumps(old) + "\n" + json.dumps(new) + "\n", encoding="utf-8")
            self.assertEqual([new], training_tables.load(pathlib.Path(folder)))

    def test_a_page_without_its_marks_is_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            self.assertEqual({}, training_tables.rendered(root))
            (root / "docs").mkdir()
            (root / "docs/training.md").write_text("# Training\n", encoding="utf-8")
            with self.assertRaises(ValueError):
                training_tables.rendered(root)


if __name__ == "__main__":
    unittest.main()
