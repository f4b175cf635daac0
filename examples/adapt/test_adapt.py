# SPDX-License-Identifier: Apache-2.0
"""The whole experiment in miniature: text, tokenizer, data, five runs, evaluation, export."""

import json
import lzma
import os
import pathlib
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).resolve().parent
torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
pytest.importorskip("safetensors")
pytest.importorskip("infllm")
sys.path.insert(0, str(HERE))

import attending
import documents
import evaluate
import numpy as np
import ruler
import run
import settings
import tokenizer
import train

CONFIG = HERE / "configs/smoke.toml"


def call(main, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        if end.code is not None:
            raise


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with text, tokenizer and data, made from the needle example's document."""
    root = tmp_path_factory.mktemp("adapt")
    text = (HERE.parent / "needle/document.txt").read_bytes()
    for split in ("train", "heldout"):
        (root / "text" / split).mkdir(parents=True)
        (root / "text" / split / "document.txt.xz").write_bytes(lzma.compress(text))
    with pytest.MonkeyPatch.context() as patch:
        call(tokenizer.main, patch, "--text", root / "text", "--out", root / "tokenizer",
             "--pieces", 1016)  # fmt: skip
        call(documents.main, patch, *paths(root), "--processes", 1)
    return root


def paths(root):
    return ("--text", root / "text", "--tokenizer", root / "tokenizer/tokenizer.model",
            "--data", root / "data")  # fmt: skip


@pytest.fixture(scope="module")
def maker(root):
    return documents.Maker(
        root / "tokenizer/tokenizer.model", documents.Filler(root / "data", "heldout")
    )


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("length", (1024, 4096))
def test_case_holds_its_answer(maker, task, length):
    sample = maker.case(3, task, length)
    assert len(sample.tokens) == len(sample.kinds) == length + 1
    assert (sample.kinds != documents.PAD).mean() > 0.75  # lists leave room for any question
    processor = maker.codec.processor
    first_answer = min(item[2] for item in sample.items)
    size = processor.vocab_size()
    document = processor.decode([t for t in sample.tokens[:first_answer].tolist() if t < size])
    for name, choices, first, last in sample.items:
        assert name == task
        item = processor.decode(sample.tokens[first:last].tolist()).strip()
        assert item and item in document
        assert (sample.kinds[first:last] == documents.ANSWER + ruler.TASKS.index(task)).all()
        assert bool(choices) == (task == "common")
        assert not choices or (last - first == 1 and sample.tokens[first] == choices[0])


def test_cases_are_the_same_every_time(maker):
    for task in ruler.TASKS:
        a, b = maker.case(5, task, 1024), maker.case(5, task, 1024)
        assert np.array_equal(a.tokens, b.tokens) and a.items == b.items
    assert not np.array_equal(maker.case(5, "single_2", 1024).tokens,
                              maker.case(6, "single_2", 1024).tokens)  # fmt: skip


def test_training_samples_fill_their_length(maker):
    turns = set()
    for seed in range(40):
        sample = maker.training(np.random.default_rng(seed), 1024)
        assert len(sample.tokens) == len(sample.kinds) == 1025
        assert sample.tokens.max() < 1024
        turns.update(item[0] for item in sample.items)
    assert len(turns) >= 6  # the mixture reaches most tasks


def test_leaders_are_the_most_frequent():
    tasks = ruler.Tasks(np.random.default_rng(1), [f"word{i}" for i in range(600)])
    for drawn in (tasks.common(4096), tasks.frequent(4096)):
        counts = {}
        for word in drawn.filler:
            counts[word.strip()] = counts.get(word.strip(), 0) + 1
        ranked = sorted(counts.values(), reverse=True)
        items = drawn.turns[0].items
        assert sorted((counts[str(i)] for i in items), reverse=True) == ranked[: len(items)]


def test_taught_rows():
    kinds = torch.full((4, 2049), documents.REST)
    kinds[1:, 1600:1640] = documents.ANSWER  # what rows 1599 to 1638 are to say, of three sequences
    answers = {2048 * b + t for b in (1, 2, 3) for t in range(1599, 1639)}
    turns = {2048 * b + t for b in (1, 2, 3) for t in range(1599 - train.ASKING, 2048)}
    generator = torch.Generator().manual_seed(1)
    rows = train.taught_rows(kinds, 64, generator).tolist()
    assert len(rows) == 64 and rows == sorted(set(rows)) and max(rows) < 4 * 2048
    # Half and a quarter of the draws, and what else falls there; 120 and 1491 rows of 8192.
    assert 20 <= len(answers & set(rows)) <= 44
    assert 34 <= len(turns & set(rows)) <= 62
    again = train.taught_rows(kinds, 64, generator)
    assert again.dtype == torch.int32 and again.tolist() != rows
    assert len(train.taught_rows(kinds[:1], 64, generator)) == 64  # text alone


def test_schedule():
    phase = settings.load(HERE / "configs/h200.toml").phases["pretrain"]
    lengths = {phase.length(step, 1) for step in range(phase.steps)}
    assert lengths == {512, 1024, 2048, 4096}
    assert phase.share(0, 0.0) == pytest.approx(1 / phase.warmup)
    assert phase.share(1000, 0.5) == 1.0 and phase.share(1000, 1.0) == pytest.approx(0.3)


def test_slow_pretraining_keeps_all_its_stages():
    assert train.fitting(1000, 100, 0.1, 900 * 0.1 * train.LATER) == 1.0
    assert train.fitting(1000, 100, 0.1, 450 * 0.1 * train.LATER) == pytest.approx(0.55)
    phase = settings.load(HERE / "configs/h200.toml").phases["pretrain"]
    short = phase.stretched(0.3)
    assert {short.length(step, 1) for step in range(short.steps)} == {512, 1024, 2048, 4096}


def test_from_pretraining_to_scores(root, monkeypatch):
    common = ("--config", CONFIG, *paths(root), "--workers", 0)
    call(train.main, monkeypatch, *common, "--phase", "pretrain", "--out", root / "short")
    model = root / "short/model"
    first = {}
    for arm, what in attending.ARMS.items():
        call(train.main, monkeypatch, *common, "--phase", "adapt", "--arm", arm,
             "--init", model, "--out", root / arm, "--log-every", 1)  # fmt: skip
        lines = (root / arm / "log.jsonl").read_text().splitlines()
        assert len(lines) == 3 and all(np.isfinite(json.loads(x)["text_loss"]) for x in lines)
        first[arm] = json.loads(lines[0])
        assert ("align_loss" in first[arm]) == what.taught
    # The same samples, and what is attended to follows from the arm alone.
    assert first["taught"]["text_loss"] == first["dense"]["text_loss"]
    assert first["aligned"]["text_loss"] == first["sparse"]["text_loss"] != first["dense"]["text_loss"]
    # A finished run that is started again has nothing left to do.
    before = (root / "sparse/log.jsonl").read_text()
    call(train.main, monkeypatch, *common, "--phase", "adapt", "--arm", "sparse",
         "--init", model, "--out", root / "sparse")  # fmt: skip
    assert (root / "sparse/log.jsonl").read_text() == before
    out = root / "results.jsonl"
    call(evaluate.main, monkeypatch, *common, "--model", root / "sparse/model", "--arm", "sparse",
         "--out", out)  # fmt: skip
    records = [json.loads(line) for line in out.read_text().splitlines()]
    tasks = [r for r in records if r["name"] == "adapt.task"]
    assert {(r["task"], r["attention"]) for r in tasks} == {
        (task, attention) for task in ruler.TASKS for attention in ("dense", "sparse")
    }
    before = out.read_text()
    call(evaluate.main, monkeypatch, *common, "--model", root / "sparse/model", "--arm", "sparse",
         "--out", out)  # fmt: skip
    assert "adapt.task" not in out.read_text().removeprefix(before)  # nothing is scored twice
    call(evaluate.main, monkeypatch, *common, "--model", root / "sparse/model", "--arm", "sparse",
         "--most-dense", 0, "--out", root / "sparse.jsonl")  # fmt: skip
    again = [json.loads(line) for line in (root / "sparse.jsonl").read_text().splitlines()]
    assert [r["each"] for r in again if r["name"] == "adapt.task"] == [
        r["each"] for r in tasks if r["attention"] == "sparse"
    ]
    # The cases that are missing, behind those that are there: as if all had been scored at once.
    more = root / "more.toml"
    more.write_text(CONFIG.read_text().replace("cases = { 1024 = 1 }", "cases = { 1024 = 3 }"))
    whole, parts = root / "whole.jsonl", root / "parts.jsonl"
    for limits, to in ((("--most", 2), parts), ((), parts), ((), whole)):
        call(evaluate.main, monkeypatch, *common, "--config", more, "--model", root / "sparse/model",
             "--arm", "sparse", "--no-text", "--out", to, *limits)  # fmt: skip
    scored = [[json.loads(line) for line in path.read_text().splitlines()] for path in (whole, parts)]
    assert all(len(r["each"]) == 3 for r in scored[0])
    assert scored[0] == scored[1][len(scored[0]) :]
    perplexities = [r for r in records if r["name"] == "adapt.perplexity"]
    assert len(perplexities) == 4 and all(3 < r["nll"] < 9 for r in perplexities)


def test_paused_run_goes_on_as_if_it_had_not(root, monkeypatch):
    """Two steps, a pause, two more: the same weights as after four steps without one."""
    common = ("--config", CONFIG, *paths(root), "--workers", 0, "--phase", "adapt", "--arm", "aligned",
              "--stretch", 4 / 3)  # fmt: skip
    monkeypatch.setattr(train, "AGREE_EVERY", 2)
    call(train.main, monkeypatch, *common, "--out", root / "whole")
    with pytest.raises(SystemExit) as paused:
        call(train.main, monkeypatch, *common, "--out", root / "halves", "--pause-at", 1)
    assert paused.value.code == os.EX_TEMPFAIL
    assert not (root / "halves/run.jsonl").exists()
    call(train.main, monkeypatch, *common, "--out", root / "halves")
    whole, halves = (torch.load(root / name / "state.pt") for name in ("whole", "halves"))
    assert whole["step"] == halves["step"] == 4
    for name, weight in whole["model"].items():
        assert torch.equal(weight, halves["model"][name]), name


def test_jobs_wait_for_what_they_need_and_go_on_later(tmp_path, monkeypatch):
    def job(name, code, **more):
        return run.Job(name, (sys.executable, "-c", code), **more)

    made = tmp_path / "made"
    jobs = [
        job("second", f"open({str(made)!r}, 'x')", needs=("first",)),
        job("first", f"import os; assert not os.path.exists({str(made)!r})", gpus=2),
        job("fails", "raise SystemExit(75)", gpus=0),
        job("never", "pass", needs=("fails",)),
    ]
    run.Jobs(tmp_path, jobs, 2, time.time() + 60).run()
    assert sorted(path.name for path in (tmp_path / "done").iterdir()) == ["first", "second"]
    jobs[2].command = (sys.executable, "-c", "pass")
    run.Jobs(tmp_path, jobs, 2, time.time() + 60).run()  # `second` would fail if it ran again
    assert len(list((tmp_path / "done").iterdir())) == 4
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense/run.jsonl").write_text('{"seconds": 300}')
    late = job("late", "pass", ahead=lambda: run.whole(tmp_path, "dense", "dense-2"))
    run.Jobs(tmp_path, [late], 1, time.time() + 300).run()  # no time for it and its scores
    assert not (tmp_path / "done/late").exists()
    run.Jobs(tmp_path, [late], 1, time.time() + 310 + run.EVALUATION).run()
    assert (tmp_path / "done/late").exists()
    monkeypatch.setattr(run, "LEAST", 0)
    slow = [job("slow", "import time; time.sleep(60)")]
    began = time.time()
    run.Jobs(tmp_path, slow, 1, began + 2).run()
    assert time.time() - began < 30 and not (tmp_path / "done/slow").exists()


def test_engine_loads_the_checkpoint(root):
    binary = os.environ.get("INFLLM_BINARY")
    if not binary or not (root / "sparse/model").exists():
        pytest.skip("INFLLM_BINARY names no program")
    answer = subprocess.run(
        [binary, "run", str(root / "sparse/model"), "The database", "-n", "4"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
