# SPDX-License-Identifier: Apache-2.0
"""The generator: answers stand in the document, budgets hold, ids of parts are ids of the whole."""

import pathlib
import re

import pytest

np = pytest.importorskip("numpy", reason="numpy is not installed: pip install numpy")

import corpus  # noqa: E402
import facts  # noqa: E402

HERE = pathlib.Path(__file__).parent
MODEL = HERE.parents[1] / "models" / "needle-32k" / "tokenizer.model"
TEXT = (HERE / "document.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def codec():
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: pip install it")
    import samples

    return samples.Codec(MODEL)


@pytest.fixture(scope="module")
def hay(codec):
    import samples

    return samples.Hay.build([TEXT], codec)


def test_units_join_to_the_text():
    assert "".join(corpus.units(TEXT)) == "\n" + TEXT.strip("\n")
    assert all(unit[0] in "\n " and len(unit) > 1 for unit in corpus.units(TEXT))


def test_plain_drops_markup_and_hidden_text():
    page = b"<head><title>t</title></head><p>One <b>bold</b>\xc2\xa0word.</p><script>x</script>Two"
    assert corpus.plain(page, is_html=True) == "One bold word.\nTwo"


@pytest.mark.parametrize("task", facts.TASKS)
def test_every_answer_is_stated_under_its_name(task):
    generator = facts.Generator(np.random.default_rng(5))
    for _ in range(10):
        drawn = generator.draw(task)
        for question in drawn.questions:
            mine = [f for f in drawn.facts if f.key == question.key]
            stated = [re.findall(r"\b\d{5}\b", f.text) for f in mine]
            assert all(len(v) == 2 and v[0] == v[1] for v in stated)  # said twice, alike
            values = [v[0] for v in stated]
            if task == "last_update":
                assert [f.order for f in mine] == list(range(1, len(mine) + 1))
                assert question.answer == values[-1]
            else:
                assert question.answer == ", ".join(values)


def test_multi_key_names_need_both_words():
    drawn = facts.Generator(np.random.default_rng(6)).multi_key()
    names = [re.search(r" of (\w+ \w+)\?", q.text).group(1).split() for q in drawn.questions]
    assert len({tuple(n) for n in names}) == 4
    assert len({n[0] for n in names}) == len({n[1] for n in names}) == 2


def test_single_names_share_no_word():
    generator = facts.Generator(np.random.default_rng(7))
    text = " ".join(generator.single().questions[0].text.split(" of ")[1] for _ in range(40))
    words = text.replace("?", "").split()
    assert len(words) == len(set(words)) == 80


def test_revisions_stand_in_their_order(codec, hay):
    haystack, units = hay
    for seed in range(20):
        rng = np.random.default_rng(seed)
        drawn = facts.Generator(rng).last_update()
        plan = facts.plan_document(
            rng, haystack.unit_tokens, haystack.line_start, drawn.facts, 2000, codec.count
        )
        text = facts.render_text(plan, units)
        places = [text.index(f.text) for f in drawn.facts]
        assert places == sorted(places)


@pytest.mark.parametrize("length", [4096, 8192])
def test_cases_fit_their_length_and_repeat(codec, length):
    import make_cases

    def make():
        return list(make_cases.cases(TEXT, codec, (length,), per_task=8))

    first, second = make(), make()
    assert first == second
    for case in first:
        longest = 0
        for q in case["questions"]:
            assert all(value in case["document"] for value in q["answer"].split(", "))
            prompt = f"user\n{case['document']}\n\n{q['question']}"
            overhead = 2 + 1 + len(codec.segment("\n")) + 1 + len(codec.segment("assistant\n"))
            longest = max(longest, len(codec.segment(prompt)) + overhead)
        assert longest == case["tokens"] <= length
        assert case["tokens"] > length - 150  # close to it: a unit has less


def test_tokens_of_parts_are_tokens_of_the_text(codec, hay):
    import samples

    haystack, units = hay
    rng = np.random.default_rng(8)
    drawn = samples.Maker(haystack, codec).draw_facts(facts.Generator(rng), 600, 6)
    plan = facts.plan_document(
        rng, haystack.unit_tokens, haystack.line_start, drawn.facts, 3000, codec.count
    )
    joined = codec.head()[2:] + samples.render_tokens(plan, haystack, codec).tolist()
    assert joined == codec.segment("user\n" + facts.render_text(plan, units))


@pytest.mark.parametrize("varied", [0.0, 1.0])
def test_training_sample_marks_the_answers(codec, hay, varied):
    import samples

    maker = samples.Maker(hay[0], codec, longest=4096)
    lengths = set()
    for seed in range(10):
        rng = np.random.default_rng(seed)
        tokens, kind, positions = maker.conversation(rng, 1024, 0.5, varied)
        assert len(tokens) == len(kind) == 1025 and len(positions) == 1024
        assert (np.diff(positions) >= 1).all() and positions[-1] < 4096
        answers = tokens[kind >= samples.ANSWER]
        assert (kind == samples.FIRST_ANSWER).sum() and (answers == codec.im_end).any()
        text = codec.processor.decode(answers[answers < codec.im_end].tolist())
        assert set(text) <= set("0123456789, ")
        ends = np.flatnonzero(tokens[kind == samples.FIRST_ANSWER] == codec.im_end)
        assert ends.tolist() == [(kind == samples.FIRST_ANSWER).sum() - 1]  # one answer is first
        first = tokens[kind == samples.FIRST_ANSWER][:-1].tolist()
        lengths |= {len(value) for value in codec.processor.decode(first).split(", ")}
    assert (lengths == {5}) == (varied == 0)


def test_varied_facts_state_their_answers():
    words = [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(9) for j in range(9)]
    digits, once = set(), 0
    for seed in range(40):
        generator = facts.VariedGenerator(np.random.default_rng(seed), words)
        for fact_set in (generator.single(), *(generator.draw(t) for t in facts.TASKS)):
            for question in fact_set.questions:
                said = " ".join(f.text for f in fact_set.facts if f.key == question.key)
                assert all(value in said for value in question.answer.split(", "))
                digits |= {len(value) for value in question.answer.split(", ")}
                once += said.count(question.answer) == 1
    assert digits == {3, 4, 5, 6, 7} and once > 0


def test_too_small_a_budget_is_refused(codec, hay):
    haystack, _ = hay
    rng = np.random.default_rng(9)
    drawn = facts.Generator(rng).multi_value()
    with pytest.raises(ValueError, match="tokens of filler wanted"):
        facts.plan_document(
            rng, haystack.unit_tokens, haystack.line_start, drawn.facts, 150, codec.count
        )
