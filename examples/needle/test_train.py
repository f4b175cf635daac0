# SPDX-License-Identifier: Apache-2.0
"""The recipe in miniature: every kind of step, a run that is cut and goes on, its checkpoint."""

import json
import pathlib
import sys

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: pip install it")
pytest.importorskip("safetensors", reason="safetensors is not installed: pip install it")
infllm = pytest.importorskip("infllm", reason="the package is not built: make python")

import evaluate  # noqa: E402
import export  # noqa: E402
import model  # noqa: E402
import recipes  # noqa: E402
import samples  # noqa: E402
import train  # noqa: E402

HERE = pathlib.Path(__file__).parent
CHECKPOINT = HERE.parents[1] / "models/needle-32k"
TOKENIZER = CHECKPOINT / "tokenizer.model"


def call(main, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    main()


def logits(net, tokens, mode, topk=4):
    sparse = infllm.SparseConfig(window_size=128, topk=topk, dense_len=0)
    bucket = recipes.Bucket(tokens.shape[1], tokens.shape[0])
    lesson = train.Lesson(recipes.Stage(1, (bucket,), align_rows=96), bucket, mode, sparse, (0, 1))
    attend = train.Attend(net.config, lesson, *tokens.shape, tokens.device)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    result = net(tokens, positions, attend)
    assert len(attend.losses) == 2 and all(torch.isfinite(x) for x in attend.losses)
    return result.detach()


def test_modes_differ_only_in_what_they_choose():
    torch.manual_seed(1)
    net = model.MiniCPM4(recipes.SMOKE.config)
    tokens = torch.randint(100, 4000, (2, 700))
    dense = logits(net, tokens, "dense")
    assert torch.equal(logits(net, tokens, "sparse", topk=9), dense)  # 11 blocks are all there are
    sparse, end = logits(net, tokens, "sparse"), logits(net, tokens, "end")
    document = 700 - 2 * 96
    assert torch.equal(end[:, :document], sparse[:, :document])
    assert not torch.equal(end[:, document:], sparse[:, document:])
    assert not torch.equal(end[:, document:], dense[:, document:])


@pytest.mark.parametrize("sparse", [False, True])
def test_questions_side_by_side_see_the_document(sparse):
    torch.manual_seed(2)
    net = model.MiniCPM4(recipes.SMOKE.config)
    document, questions = torch.randint(100, 4000, (1, 650)), torch.randint(100, 4000, (3, 9))
    config = recipes.SMOKE.config.sparse

    def read(tokens, begin, attend):
        positions = torch.arange(begin, begin + tokens.shape[1]).expand_as(tokens)
        return net(tokens, positions, attend).detach()

    attend = evaluate.Attend(config, sparse)
    read(document, 0, attend)
    apart = read(questions, 650, attend)
    for row, question in zip(apart, questions):
        whole = torch.cat([document, question[None]], 1)
        together = read(whole, 0, evaluate.Attend(config, sparse))[0, 650:]
        assert torch.equal(row.argmax(-1), together.argmax(-1))


def test_checkpoint_answers_the_sample():
    cases = [json.loads(x) for x in (HERE / "sample_cases.jsonl").read_text().splitlines()]
    device = torch.device("cpu")
    counts = evaluate.count(
        evaluate.load(CHECKPOINT, device), samples.Codec(TOKENIZER), cases, device
    )
    assert {attention for _, _, attention in counts} == {"dense", "sparse"}
    assert all(right == asked > 0 for right, asked in counts.values())
    assert "single" in evaluate.table(counts)


def test_long_factors_hold_above_the_original_length_only():
    config = model.Config(max_position_embeddings=4000, original_max_position_embeddings=1000)
    plain = model.Config(max_position_embeddings=1000)
    short, long = torch.arange(1000)[None], torch.arange(1001)[None]
    assert plain.long_factor == [1.0] * 32
    assert config.long_factor[0] == 1 and config.long_factor[-1] == 4
    assert config.long_factor == sorted(config.long_factor)
    same = torch.stack(model.rope_table(short, config))
    assert torch.equal(same, torch.stack(model.rope_table(short, plain)))
    slow = torch.stack(model.rope_table(4 * long, config))
    assert torch.allclose(slow[..., 31], torch.stack(model.rope_table(long, plain))[..., 31])


def test_run_cut_and_continued_then_exported(tmp_path, monkeypatch):
    hay, _ = samples.Hay.build(
        [(HERE / "document.txt").read_text(encoding="utf-8")], samples.Codec(TOKENIZER)
    )
    hay.save(tmp_path / "train.npz")
    common = ("--recipe", "smoke", "--data", tmp_path, "--tokenizer", TOKENIZER, "--workers", 0)
    common += ("--log-every", 1)
    call(train.main, monkeypatch, *common, "--out", tmp_path / "cut", "--time-limit", 1e-9)
    call(train.main, monkeypatch, *common, "--out", tmp_path / "cut")
    lines = [json.loads(x) for x in (tmp_path / "cut/log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(recipes.SMOKE.steps))
    losses = [x["rest_loss"] for x in lines]
    assert max(losses[-3:]) < min(losses[:10])  # the first ten were cut: their rate was next to 0
    assert {x["attention"] for x in lines} == {"dense", "sparse", "end"}

    call(export.main, monkeypatch, "--recipe", "smoke", "--state", tmp_path / "cut/state.pt",
         "--out", tmp_path / "model")  # fmt: skip
    assert model.Config.load(tmp_path / "model") == recipes.SMOKE.config
