# SPDX-License-Identifier: Apache-2.0
"""Eleven tasks in the manner of RULER: what a document holds, what is asked, what is expected.

    single_1     one number in a few sentences said over and over
    single_2     one number in real text
    single_3     one code of eight hexadecimal digits in real text
    multi_key_1  four numbers in real text, one is asked; the names share words
    multi_key_2  nothing but such facts, one is asked
    multi_key_3  the same with codes for names and for values
    multi_value  one name with four numbers; all are asked
    multi_query  four names with a number each are asked in one question
    variables    a chain X1 = 48213, X2 = X1, ... X5 = X4; which variables hold 48213?
    common       a list of words, ten of them ten times as often as the others; which?
    frequent     coded words, the k-th as often as 1 / k^2; which three lead?

An answer is a list of items in a fixed order (the document's, the question's, the chain's, of
frequency; the common words in any), after a lead that repeats the question, as RULER's answer prefix
does:

    The secret number of grey fox is 48213

`draw` makes one task for evaluation, `draw_mixture` a training document with many questions. Needs
numpy only.
"""

import dataclasses

import numpy as np
from needle import facts

TASKS = (
    "single_1", "single_2", "single_3", "multi_key_1", "multi_key_2", "multi_key_3",
    "multi_value", "multi_query", "variables", "common", "frequent",
)  # fmt: skip
NOISE = (
    "Rain falls on the hills.", "Wind moves the leaves.", "Water runs to the sea.",
    "Birds cross the sky.", "Here we begin.", "And so it goes on.",
)  # fmt: skip
HEX = np.array(list("0123456789abcdef"))
CHAIN, COMMON, LEADERS = 5, 10, 3


@dataclasses.dataclass
class Turn:
    task: str
    question: str
    lead: str
    items: list
    any_order: bool = False  # then every item is one token


@dataclasses.dataclass
class Draw:
    """Facts to plant in filler, and turns to ask. `filler`: "text", "noise", or a list of texts."""

    facts: list
    turns: list
    filler: str | list = "text"


def number_fact(name, value):
    return f"The secret number of {name} is {value}."


def code_fact(name, value):
    return f"The secret code of {name} is {value}."


def ask_one(task, kind, name, value):
    return Turn(
        task,
        f"What is the secret {kind} of {name} in the text?",
        f"The secret {kind} of {name} is",
        [value],
    )


class Tasks:
    """Draws facts and turns from a numpy generator; `words` are the list tasks' vocabulary."""

    def __init__(self, rng, words):
        self.rng, self.words = rng, words
        self.names = facts.Generator(rng, invented_names=0.1)

    def code(self):
        return "-".join("".join(self.rng.choice(HEX, 4)) for _ in range(2))

    def _fact(self, text, order=-1, key=0):
        return facts.Fact(text, key, order)

    def single(self, task="single_2"):
        name, value = self.names.name(), self.names.value()
        return Draw([self._fact(number_fact(name, value))], [ask_one(task, "number", name, value)])

    def single_code(self):
        name, value = self.names.name(), self.code()
        fact = self._fact(code_fact(name, value))
        return Draw([fact], [ask_one("single_3", "code", name, value)])

    def multi_key(self, task="multi_key_1"):
        g = self.names
        a, b, c, d = g.first.pop(), g.first.pop(), g.second.pop(), g.second.pop()
        names = [f"{a} {c}", f"{a} {d}", f"{b} {c}", f"{b} {d}"]
        values = [g.value() for _ in names]
        return Draw(
            [self._fact(number_fact(n, v)) for n, v in zip(names, values)],
            [ask_one(task, "number", n, v) for n, v in zip(names, values)],
        )

    def multi_value(self):
        name, values = self.names.name(), [self.names.value() for _ in range(4)]
        key = self.names._key()
        return Draw(
            [self._fact(number_fact(name, v), i, key) for i, v in enumerate(values)],
            [
                Turn(
                    "multi_value",
                    f"What are all the secret numbers of {name} in the text?",
                    f"The secret numbers of {name} are",
                    values,
                )
            ],
        )

    def multi_query(self):
        names = [self.names.name() for _ in range(4)]
        values = [self.names.value() for _ in names]
        joined = f"{names[0]}, {names[1]}, {names[2]} and {names[3]}"
        return Draw(
            [self._fact(number_fact(n, v)) for n, v in zip(names, values)],
            [
                Turn(
                    "multi_query",
                    f"What are the secret numbers of {joined} in the text?",
                    f"The secret numbers of {joined} are",
                    values,
                )
            ],
        )

    def variables(self):
        names = []
        while len(names) < CHAIN:
            parts = self.rng.choice(facts.SYLLABLES, 3)
            name = "".join(parts).capitalize()
            if name not in names:
                names.append(name)
        value, key = self.names.value(), self.names._key()
        texts = [f"VAR {names[0]} = {value}."]
        texts += [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:])]
        return Draw(
            [self._fact(t, i, key) for i, t in enumerate(texts)],
            [
                Turn(
                    "variables",
                    f"Which variables are assigned the value {value} in the text?",
                    f"The variables assigned the value {value} are",
                    names,
                )
            ],
        )

    def needles(self, task, room, count, turns):
        """A document of facts alone, about `room` tokens of them; `turns` of them are asked."""
        kind, say = ("number", number_fact) if task == "multi_key_2" else ("code", code_fact)
        pairs, lines, cost = {}, [], 1.0  # cost: tokens a line, by the first eight
        while len(lines) < room / cost:
            name, value = self.code(), self.code()
            if kind == "number":
                words = self.rng.choice(facts.FIRST_WORDS), self.rng.choice(facts.SECOND_WORDS)
                name, value = f"{words[0]} {words[1]}", str(self.rng.integers(10_000, 100_000))
                if room > 8192 or name in pairs:  # more facts than pairs of words
                    name += f" {self.rng.integers(1000)}"
            if name in pairs:
                continue
            pairs[name] = value
            lines.append(" " + say(name, value))
            if len(lines) <= 8:
                cost = sum(map(count, lines)) / len(lines)
        chosen = self.rng.permutation(list(pairs))[:turns]
        return Draw([], [ask_one(task, kind, str(n), pairs[str(n)]) for n in chosen], lines)

    def common(self, room):
        """Words of one token each: ten of them 30 times, the others 3 times, in a list of 4K tokens."""
        vocabulary = self.rng.permutation(self.words)
        seldom = max(1, min(3, room // 400))  # in short lists 10 times and once
        seldom = max(seldom, room // (len(vocabulary) + 90))  # in long ones the words run out
        others = max(1, room // seldom - 10 * COMMON)
        listed = [w for w in vocabulary[:COMMON] for _ in range(10 * seldom)]
        listed += [w for w in np.resize(vocabulary[COMMON:], others) for _ in range(seldom)]
        listed = [listed[i] for i in self.rng.permutation(len(listed))]
        turn = Turn(
            "common",
            "What are the ten most common words in the list?",
            "The ten most common words are",
            [str(w) for w in vocabulary[:COMMON]],
            any_order=True,
        )
        return Draw([], [turn], [" " + w for w in listed])

    def frequent(self, room):
        """Coded words; the k-th is drawn with weight 1 / k^2."""
        coded = list(
            dict.fromkeys("".join(self.rng.choice(facts.SYLLABLES, 3)) for _ in range(200))
        )
        weight = 1.0 / np.arange(1, len(coded) + 1) ** 2
        drawn = self.rng.choice(len(coded), int(room / 3.2), p=weight / weight.sum())
        counts = np.bincount(drawn, minlength=len(coded))
        leaders = np.argsort(-counts, kind="stable")[:LEADERS]
        turn = Turn(
            "frequent",
            "What are the three most frequent words in the coded text?",
            "The three most frequent words are",
            [coded[i] for i in leaders],
        )
        return Draw([], [turn], [" " + coded[i] for i in drawn])

    def draw(self, task, room, count):
        """One task for evaluation. room: tokens of the document; count: text -> tokens."""
        if task.startswith("single"):
            drawn = self.single_code() if task == "single_3" else self.single(task)
            drawn.filler = "noise" if task == "single_1" else "text"
        elif task == "multi_key_1":
            drawn = self.multi_key()
        elif task.startswith("multi_key"):
            drawn = self.needles(task, room, count, turns=4)
        elif task in ("common", "frequent"):
            drawn = getattr(self, task)(room)
        else:
            drawn = getattr(self, task)()
        return drawn

    def draw_mixture(self, room, count, most_turns):
        """A training document: facts of several kinds with many turns, or one of the other kinds."""
        kind = self.rng.choice(("facts", "needles", "lists", "text"), p=(0.62, 0.17, 0.13, 0.08))
        if kind == "text":
            return Draw([], [])
        if kind == "lists":
            return self.common(room) if self.rng.random() < 0.35 else self.frequent(room)
        if kind == "needles":
            task = self.rng.choice(("multi_key_2", "multi_key_3"))
            return self.needles(str(task), room, count, most_turns)
        merged = Draw([], [], "noise" if self.rng.random() < 0.12 else "text")
        share = self.rng.uniform(0.45, 0.75) if room < 1024 else self.rng.uniform(0.08, 0.35)
        makers = (self.single, self.single_code, self.multi_key, self.multi_value,
                  self.multi_query, self.variables)  # fmt: skip
        weights = (0.16, 0.12, 0.12, 0.22, 0.16, 0.22)
        used = 0
        while self.names.room() >= 4 and len(merged.turns) < most_turns:
            drawn = makers[self.rng.choice(len(makers), p=weights)]()
            used += sum(count(" " + f.text) for f in drawn.facts)
            if used > room * share and merged.facts:
                break
            merged.facts += drawn.facts
            merged.turns += drawn.turns
        order = self.rng.permutation(len(merged.turns))[:most_turns]
        merged.turns = [merged.turns[i] for i in order]
        return merged
