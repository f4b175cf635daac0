# SPDX-License-Identifier: Apache-2.0
"""Results in, documents out: the schema, which line wins, the tables and the check mode."""

import contextlib
import io
import json
import pathlib
import tempfile
import unittest
import xml.etree.ElementTree

import chart
import region
import render_results
import results


def measurement(**changes):
    record = {"name": "attention.forward", "backend": "cpu:avx2", "device": "Some CPU",
              "commit": "0123456789abcdef", "date": "2026-01-02",
              "shape": {"heads_q": 16, "heads_kv": 2, "head_dim": 64, "tokens": 32768},
              "input": "correlated-0.8", "ms": 100.0, "ms_low": 99.0, "ms_high": 101.0, "peer": "dense",
              "peer_ms": 700.0, "ratio": 7.0}
    return {**record, **changes}


def evaluation(**changes):
    record = {"name": "eval.needle", "model": "needle-32k", "task": "single", "length": 32768,
              "attention": "dense", "correct": 200, "total": 200, "backend": "cpu"}
    return {**record, **changes}


def written(depth, **changes):
    shape = {"model": "8b", "weights": "bfloat16", "attention": "sparse", "tokens": 64, "depth": depth}
    return {"name": "model.decode", "device": "Some GPU", "ms": 320.0, "shape": {**shape, **changes}}


class SchemaTest(unittest.TestCase):
    def refused(self, record, message):
        with self.assertRaisesRegex(results.BadResult, message):
            results.parse_line(json.dumps(record))

    def test_good_lines_pass(self):
        results.parse_line(json.dumps(measurement()))
        results.parse_line(json.dumps(evaluation()))

    def test_a_field_that_is_missing_unknown_or_of_another_type(self):
        for field in results.MEASUREMENT_REQUIRED - {"name"}:
            record = measurement()
            del record[field]
            self.refused(record, f'"{field}" is missing')
        self.refused(measurement(milliseconds=1), 'found the field "milliseconds"')
        self.refused(measurement(ms="1"), "expected a number")
        self.refused(measurement(ms=True), "expected a number")
        self.refused(measurement(shape={"tokens": [1]}), 'shape "tokens"')
        self.refused([], "expected an object")

    def test_numbers_that_cannot_be(self):
        self.refused(measurement(ms=0), "expected a positive number")
        self.refused(measurement(gbps=float("nan")), "expected a positive number")
        self.refused(measurement(ms_low=100.5), "between ms_low and ms_high")
        self.refused(measurement(ratio=8.0), "expected peer_ms / ms = 7")
        self.refused(measurement(visible_share=1.5), "0 to 1")
        self.refused(measurement(steps_ms={"attend": -1}), "expected milliseconds")
        self.refused(measurement(date="yesterday"), "YYYY-MM-DD")
        self.refused(evaluation(correct=201), "no count")
        self.refused(evaluation(total=0, correct=0), "no count")
        self.refused(evaluation(attention="both"), "dense or sparse")
        self.refused(evaluation(visible_share=6), "0 to 1")

    def test_a_peer_comes_with_its_time(self):
        record = measurement()
        del record["peer_ms"]
        self.refused(record, "come together")

    def test_the_ratio_is_computed_when_it_is_not_given(self):
        record = measurement()
        del record["ratio"]
        self.assertEqual(results.parse_line(json.dumps(record))["ratio"], 7.0)


class RenderTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = pathlib.Path(folder.name)
        (self.root / "bench/results").mkdir(parents=True)
        (self.root / "docs").mkdir()
        for page, marks in (("README.md", render_results.README_MARKS),
                            ("docs/performance.md", render_results.PAGE_MARKS)):
            (self.root / page).write_text(
                "# x\n{}\nold\n{}\nlast\n".format(*region.marks(*marks)), encoding="utf-8")

    def write(self, *records, name="a.jsonl"):
        (self.root / "bench/results" / name).write_text(
            "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    def render(self, *arguments):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = render_results.main(["--root", str(self.root), *arguments])
        return code, output.getvalue()

    def text(self, path):
        return (self.root / path).read_text(encoding="utf-8")

    def test_a_line_becomes_a_row(self):
        self.write(measurement())
        self.assertEqual(self.render()[0], 0)
        self.assertIn("| `attention.forward` | cpu:avx2 | 16/2 heads, d 64 | 32K | correlated-0.8 | "
                      "100 (99-101) | dense | 700 | 7 | `012345678` |",
                      self.text("docs/performance.md"))
        self.assertIn("| 32K | 100 ms | 700 ms (dense) | 7x |", self.text("README.md"))
        for page in ("README.md", "docs/performance.md"):
            self.assertIn("last\n", self.text(page))
            self.assertNotIn("old", self.text(page))

    def test_the_headline_of_a_layer_is_of_one_input(self):
        self.write(measurement(), measurement(input="random", ms=50.0, ms_low=50.0, ms_high=50.0,
                                              peer_ms=700.0, ratio=14.0))
        self.render()
        self.assertIn("7x", self.text("README.md"))
        self.assertNotIn("14x", self.text("README.md"))

    def test_the_later_date_wins_in_whichever_order(self):
        new = measurement(ms=50.0, ms_low=49.0, ms_high=51.0, ratio=14.0, date="2026-01-03")
        self.write(new, measurement())
        self.render()
        self.assertIn("14x", self.text("README.md"))
        self.assertNotIn("7x", self.text("README.md"))

    def test_what_differs_in_shape_device_or_peer_is_kept_apart(self):
        self.write(measurement(), measurement(device="Other CPU"),
                   measurement(peer="llama.cpp"),
                   measurement(shape={**measurement()["shape"], "threads": 2}))
        self.assertEqual(len(results.load(self.root / "bench/results")[0]), 4)

    def test_answers_stand_beside_each_other(self):
        self.write(evaluation(), evaluation(attention="sparse", correct=198, visible_share=0.05),
                   evaluation(task="several", correct=100),
                   evaluation(task="several", attention="sparse", correct=99, visible_share=0.07))
        self.render()
        self.assertIn("| needle-32k | cpu | single | 32K | 100.0 % | 99.0 % | 99.0 % | 5.0 % | 200 |",
                      self.text("docs/performance.md"))
        self.assertIn("| needle-32k | cpu | all tasks | 32K | 75.0 % | 74.2 % | 99.0 % | 6.0 % | 400 |",
                      self.text("README.md"))

    def test_the_readme_prefers_the_engine_to_the_trainer(self):
        self.write(evaluation(), evaluation(backend="pytorch", correct=150))
        self.render()
        self.assertIn("75.0 %", self.text("docs/performance.md"))
        self.assertNotIn("pytorch", self.text("README.md"))
        self.assertIn("| needle-32k | cpu | all tasks |", self.text("README.md"))

    def test_what_the_program_states_once_becomes_part_of_the_shape(self):
        self.write(measurement(column="cpu:avx512", backend="cpu", dtype="bf16", threads=2,
                               model="needle-32k"))
        self.render()
        self.assertIn("| cpu:avx512 | needle-32k, bf16, 2 threads | 32K |",
                      self.text("docs/performance.md"))

    def test_where_the_time_goes_is_a_table_of_its_own(self):
        shape = {"model": "needle-32k", "attention": "sparse", "tokens": 64, "depth": 32768}
        self.write(measurement(name="model.decode", shape=shape, visible_share=0.0588,
                               steps_ms={"attend_ms": 30.0, "mlp_ms": 60.0, "rope_ms": 1.5,
                                         "norm_ms": 2.5}))
        self.render()
        text = self.text("docs/performance.md")
        self.assertIn("| `model.decode` | cpu:avx2 | needle-32k, sparse | 64 after 32K | 5.9 % |", text)
        self.assertIn("| what | shape | tokens | attend | mlp | rest |", text)
        self.assertIn("| `model.decode` | needle-32k, sparse | 64 after 32K | 30 | 60 | 4 |", text)

    def test_check_fails_until_rendered(self):
        self.write(measurement())
        code, output = self.render("--check")
        self.assertEqual(code, 1)
        self.assertIn("run `make render`", output)
        self.render()
        self.assertEqual(self.render("--check"), (0, ""))
        self.write(measurement(), measurement(device="Other CPU"))
        self.assertEqual(self.render("--check")[0], 1)

    def test_a_page_may_have_several_rendered_parts(self):
        page = self.root / "docs/verification.md"
        parts = (("gpu-tests", "tools/gpu_tests_table.py"), ("sanitizers", "tools/sanitizer_table.py"))
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("".join(f"{'stale'.join(m + chr(10) for m in region.marks(*part))}" for part in parts),
                        encoding="utf-8")
        self.render()
        self.assertNotIn("stale", page.read_text(encoding="utf-8"))
        self.assertEqual(page.read_text(encoding="utf-8").count("No results yet."), 2)

    def test_a_bad_line_is_named(self):
        self.write(measurement(), {"name": "attention.forward"}, name="b.jsonl")
        code, output = self.render()
        self.assertEqual(code, 1)
        self.assertIn("b.jsonl:2:", output)

    def test_the_picture_is_drawn_from_two_lengths_on(self):
        self.write(measurement())
        self.render()
        self.assertFalse((self.root / "docs/attention-time-1.svg").exists())
        self.write(measurement(), measurement(shape={**measurement()["shape"], "tokens": 8192},
                                              ms=20.0, ms_low=20.0, ms_high=20.0, peer_ms=40.0,
                                              ratio=2.0))
        self.render()
        picture = xml.etree.ElementTree.fromstring(self.text("docs/attention-time-1.svg"))
        self.assertEqual(len(picture.findall("{*}polyline")), 2)
        self.assertIn("attention-time-1.svg", self.text("docs/performance.md"))

    def test_a_gpu_picture_has_the_best_dense_peer_the_published_kernels_and_the_floor(self):
        def at(tokens, ms, **changes):
            return measurement(shape={**measurement()["shape"], "tokens": tokens}, ms=ms, ms_low=ms,
                               ms_high=ms, device="GPU", backend="cuda:0:sm90", roofline=0.5,
                               **changes)
        ours = [at(8192, 1.0, peer="cudnn", peer_ms=2.0, ratio=2.0),
                at(32768, 8.0, peer="cudnn", peer_ms=32.0, ratio=4.0),
                at(8192, 1.0, peer="dense", peer_ms=3.0, ratio=3.0),
                at(32768, 8.0, peer="dense", peer_ms=40.0, ratio=5.0)]
        published = [at(32768, 8.0, peer=render_results.PUBLISHED, peer_ms=20.0, ratio=2.5,
                        peer_version="0.1.0, f908e73"),
                     at(32768, 9.0, peer=render_results.PUBLISHED, peer_ms=30.0, ratio=3.33,
                        input="random")]
        self.write(*ours, *published)
        self.render()
        self.assertIn("Peers: infllm_v2 (0.1.0, f908e73).", self.text("docs/performance.md"))
        text = self.text("docs/attention-time-1.svg")
        self.assertFalse((self.root / "docs/attention-time-2.svg").exists())
        labels = [label.text for label in
                  xml.etree.ElementTree.fromstring(text).findall("{*}text") if label.get("fill")]
        self.assertEqual(labels, ["dense (cudnn), 32 ms", "published kernels, 20 ms",
                                  "infllm.cpp, 8 ms", "floor, 4 ms"])

    def test_without_marks_the_readme_is_left_alone(self):
        (self.root / "README.md").write_text("no marks\n", encoding="utf-8")
        self.assertEqual(self.render()[0], 1)
        self.assertEqual(self.text("README.md"), "no marks\n")


class ChartTest(unittest.TestCase):
    def test_longer_is_further_right_and_slower_is_higher(self):
        picture = xml.etree.ElementTree.fromstring(
            chart.line_chart("a < b & c", {"dense": [(1024, 1.0), (4096, 40.0)]}))
        (line,) = picture.findall("{*}polyline")
        (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in line.get("points").split())
        self.assertLess(x0, x1)
        self.assertGreater(y0, y1)
        self.assertEqual(picture.find("{*}text").text, "a < b & c")


class WritingTest(unittest.TestCase):
    def test_tokens_a_second_by_depth(self):
        records = [written(1000000), written(32768), written(0), written(32768, attention="dense")]
        self.assertEqual(
            render_results.writing(records),
            "Tokens a second that a model of the shape 8b, bfloat16, writes on Some GPU: "
            "200 behind 32K, 200 behind 1,000,000 tokens.\n")

    def test_nothing_without_such_a_run(self):
        self.assertEqual(render_results.writing([measurement()]), "")


if __name__ == "__main__":
    unittest.main()
