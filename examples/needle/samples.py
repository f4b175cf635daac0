# SPDX-License-Identifier: Apache-2.0
"""Token-level documents and conversations: filler is tokenised once, facts as they are drawn.

    python3 examples/needle/samples.py     # .train/text/train -> .train/data/train.npz

Pieces of this tokenizer never reach across a space or a line break, so a document's ids are its
parts' ids joined. A conversation is rendered as the chat template would, answers included:

    <s><|im_start|>user\\nDOCUMENT\\n\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\nANSWER<|im_end|>\\n
       <|im_start|>user\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\n ...

Needs numpy and sentencepiece.
"""

import argparse
import dataclasses
import functools
import pathlib
import re

import corpus
import facts
import numpy as np
import sentencepiece

PAD, REST, ANSWER, FIRST_ANSWER = range(4)  # what a target token is
LEAST_FILLER = 160  # tokens of real text in the shortest training document
LONG = 49152  # documents with more questions, for there are few of them
INVENTED_NAMES = 0.25
WORDS_FROM = 300_000  # tokens whose words name things in facts of more kinds


class Codec:
    """Ids of text in its place: after a special token, or inside a line of text."""

    def __init__(self, model_file):
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        base = self.processor.vocab_size()
        self.im_end, self.im_start = base, base + 1
        self.bos, self.eos = 1, 2
        self.inner = functools.lru_cache(maxsize=4096)(self._inner)

    def segment(self, text: str) -> list:
        """Ids of text that follows a special token: the dummy prefix applies."""
        return self.processor.encode(text)

    def _inner(self, text: str) -> list:
        """Ids of text that begins with a space or a line break and follows other text."""
        return self.processor.encode("\n" + text)[2:]

    def count(self, text: str) -> int:
        return len(self.inner(text))

    def head(self) -> list:
        """Up to and without the line break after the first role."""
        return [self.bos, self.im_start] + self.segment("user")

    def ask(self, question: str) -> list:
        """What follows the document: the question, the end of the turn, the generation prompt."""
        return (
            self.inner("\n\n" + question)
            + [self.im_end]
            + self.segment("\n")
            + [self.im_start]
            + self.segment("assistant\n")
        )

    def ask_again(self, question: str) -> list:
        return (
            self.segment("\n")
            + [self.im_start]
            + self.segment("user\n" + question)
            + [self.im_end]
            + self.segment("\n")
            + [self.im_start]
            + self.segment("assistant\n")
        )

    def answer(self, answer: str) -> list:
        """The answer after "assistant\\n", and the end of the turn."""
        return self.inner("\n" + answer)[1:] + [self.im_end]


@dataclasses.dataclass
class Hay:
    tokens: np.ndarray  # uint16
    unit_tokens: np.ndarray  # [n + 1] running token count
    line_start: np.ndarray  # [n]

    @staticmethod
    def build(texts, codec: Codec):
        """Returns the hay of the texts and their units."""
        ids, counts, starts, all_units = [], [], [], []
        for text in texts:
            for unit in corpus.units(text):
                if unit[0] == "\n":
                    first = len(counts)
                starts.append(first)
                encoded = codec.processor.encode("\n" + unit)[2:]
                ids.append(np.asarray(encoded, np.uint16))
                counts.append(len(encoded))
                all_units.append(unit)
        hay = Hay(np.concatenate(ids), np.concatenate([[0], np.cumsum(counts)]), np.asarray(starts))
        return hay, all_units

    def save(self, path):
        np.savez(
            path,
            tokens=self.tokens,
            unit_tokens=self.unit_tokens.astype(np.int32),
            line_start=self.line_start.astype(np.int32),
        )

    @staticmethod
    def load(path):
        with np.load(path) as data:
            return Hay(data["tokens"], data["unit_tokens"].astype(np.int64), data["line_start"])


def render_tokens(plan: facts.Plan, hay: Hay, codec: Codec) -> np.ndarray:
    parts, at = [], plan.start
    for place, text in plan.planted:
        parts.append(hay.tokens[hay.unit_tokens[at] : hay.unit_tokens[place]])
        parts.append(np.asarray(codec.inner(text), np.uint16))
        at = place
    parts.append(hay.tokens[hay.unit_tokens[at] : hay.unit_tokens[plan.stop]])
    return np.concatenate(parts)


# How often a task is drawn for a training document; multi_key brings four questions at once.
TASK_WEIGHTS = {"single": 0.25, "multi_key": 0.15, "multi_value": 0.3, "last_update": 0.3}


def spread_positions(rng, length, tail, longest):
    """Positions with gaps inside the document, so that distances up to `longest` occur."""
    positions = np.arange(length)
    extra = int(rng.integers(0, max(1, longest - length)))
    cuts = np.sort(rng.integers(1, max(2, length - tail), size=6))
    sizes = np.diff(np.concatenate([[0], np.sort(rng.integers(0, extra + 1, size=5)), [extra]]))
    for cut, size in zip(cuts, sizes):
        positions[cut:] += size
    return positions


def dialogue(questions, codec: Codec):
    """Ids of all turns after the document, and what each id is."""
    ids, kinds = [], []
    for i, question in enumerate(questions):
        asked = codec.ask_again(question.text) if i else codec.ask(question.text)
        answer = codec.answer(question.answer)
        ids += asked + answer
        kinds += [REST] * len(asked) + [ANSWER if i else FIRST_ANSWER] * len(answer)
    return ids, kinds


class Maker:
    """Makes training samples of one text; `longest` bounds the positions of those with gaps."""

    def __init__(self, hay: Hay, codec: Codec, longest=40960):
        self.hay, self.codec, self.longest = hay, codec, longest
        some = codec.processor.decode(hay.tokens[:WORDS_FROM].tolist())
        self.words = sorted(set(re.findall(r"\b[a-z]{3,10}\b", some)))

    def draw_facts(self, generator, budget: int, most_questions: int):
        """Facts of at most `budget` tokens, and at most `most_questions` of their questions."""
        rng = generator.rng
        wanted = most_questions if rng.random() < 0.5 else int(rng.integers(1, most_questions + 1))
        sets, used, questions = [], 0, 0
        spare = rng.random() < 0.5  # more facts than questions
        while generator.room() >= 2:
            task = rng.choice(list(TASK_WEIGHTS), p=list(TASK_WEIGHTS.values()))
            drawn = generator.draw(task)
            cost = sum(self.codec.count(" " + f.text) for f in drawn.facts)
            if used + cost > budget:
                if sets:
                    break
                continue
            sets.append(drawn)
            used += cost
            questions += len(drawn.questions)
            if questions >= wanted and not (spare and rng.random() < 0.8):
                break
        merged = facts.merge(sets)
        chosen = rng.permutation(len(merged.questions))[:wanted]
        merged.questions = [merged.questions[i] for i in chosen]
        return merged

    def conversation(self, rng, length: int, spread=0.0, varied=0.0):
        """One sample: tokens and their kinds [length + 1], positions [length].

        spread, varied: how likely its positions have gaps, and its facts are of more kinds.
        """
        codec, hay = self.codec, self.hay
        most_questions = int(np.clip(length // 100, 5, 24 if length < LONG else 40))
        share = rng.uniform(0.5, 0.8) if length <= 1024 else rng.uniform(0.2, 0.45)
        is_varied = rng.random() < varied
        head = codec.head()
        while True:
            generator = (
                facts.VariedGenerator(rng, self.words)
                if is_varied
                else facts.Generator(rng, INVENTED_NAMES)
            )
            drawn = self.draw_facts(generator, int(length * share), most_questions)
            tail, kinds = dialogue(drawn.questions, codec)
            budget = length + 1 - len(head) - len(tail)
            if budget - sum(codec.count(" " + f.text) for f in drawn.facts) >= LEAST_FILLER:
                break
            share *= 0.9
        plan = facts.plan_document(
            rng, hay.unit_tokens, hay.line_start, drawn.facts, budget, codec.count
        )
        document = render_tokens(plan, hay, codec)
        padding = budget - len(document)
        tokens = np.concatenate([head, document, tail, np.full(padding, codec.eos)])
        kind = np.concatenate(
            [np.full(len(head) + len(document), REST), kinds, np.full(padding, PAD)]
        )
        positions = np.arange(length)
        if rng.random() < spread:
            positions = spread_positions(rng, length, len(tail) + padding, self.longest)
        return tokens.astype(np.int64), kind.astype(np.int64), positions


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=pathlib.Path, default=pathlib.Path(".train/text"))
    parser.add_argument("--tokenizer", default="models/needle-32k/tokenizer.model")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".train/data"))
    args = parser.parse_args()
    codec = Codec(args.tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = [p.read_text(encoding="utf-8") for p in sorted((args.text / "train").glob("*.txt"))]
    hay, _ = Hay.build(texts, codec)
    hay.save(args.out / "train.npz")
    print(f"{len(hay.tokens) / 1e6:.2f} M tokens in {len(hay.line_start)} units")


if __name__ == "__main__":
    main()
