# SPDX-License-Identifier: Apache-2.0
"""Facts, the questions about them, and where they stand in a document.

Four tasks. Every fact is said twice in a row, in two phrasings; every value has five digits.

    single       one fact a name; the names of a document's `single` facts share no word with others
    multi_key    one fact a name; names come in fours over the same words ("grey fox", "grey owl",
                 "tall fox", "tall owl"), so one matching word is not enough
    multi_value  three facts a name, in any order in the document; all three values are asked
    last_update  two to five revisions a name, in order; the value after the last one is asked

Example of a document with one planted fact, and the question:

    ... real text ...
    The pass code of grey fox is 48213. Remember, for grey fox the pass code is 48213.
    ... real text ...

    What is the pass code of grey fox?            ->  48213

Needs numpy only.
"""

import dataclasses

import numpy as np

TASKS = ("single", "multi_key", "multi_value", "last_update")
ORDINALS = ("first", "second", "third")
ATTRIBUTES = ("pass code", "serial number", "room number", "phone number")
MAX_REVISIONS = 5
LEAST_FILLER = 100  # tokens of real text in the shortest document

FIRST_WORDS = (
    "amber ancient azure bitter black blue bold brave bright broad bronze calm clever cold copper "
    "crimson curious dark deep distant dry eager early empty faint fast fierce fine frozen gentle "
    "giant golden grand green grey happy heavy hidden hollow humble icy iron jolly kind late light "
    "little lonely long loud lucky misty noble northern old pale patient plain proud quick quiet "
    "rapid red rough round royal rusty secret sharp silent silver slow small smooth soft solid "
    "southern still strong sunny sweet swift tall tame thin tiny violet warm western white wide "
    "wild wise wooden yellow young"
).split()
SECOND_WORDS = (
    "anchor apple arrow badger barn basket bear bell bird boat bottle branch bridge brook candle "
    "canyon castle cat cave cedar chair cliff cloud clock coach coast comet crane creek crow crown "
    "deer desert dog dolphin door dove dragon drum eagle engine falcon farm feather ferry field "
    "finch fire flute forest fox garden gate glacier goose grove hammer harbor hawk heron hill "
    "horse island kettle kite lake lamp lantern leaf lion maple market meadow mill mirror moon "
    "mountain oak ocean orchard otter owl palace panda parrot pearl pine pony raven river robin "
    "rocket rose sail seal shadow ship star stone storm summit swan temple tiger tower train "
    "tulip turtle valley violin wagon well whale willow wolf"
).split()
SYLLABLES = (
    "ba be bo da de do fa fe go ha ka ke ki la le lo ma me mi "
    "mo na ne no ra re ri ro sa se so ta te to va ve vi za zo"
).split()


@dataclasses.dataclass
class Fact:
    """One statement to plant. Facts of one `key` with an `order` appear in that order."""

    text: str
    key: int
    order: int = -1


@dataclasses.dataclass
class Question:
    task: str
    text: str
    answer: str
    key: int


@dataclasses.dataclass
class FactSet:
    facts: list
    questions: list


def plain_fact(attribute: str, name: str, value: str) -> str:
    """The statement of `single` and `multi_key`."""
    return f"The {attribute} of {name} is {value}. Remember, for {name} the {attribute} is {value}."


class Generator:
    """Draws facts and questions; everything follows from the numpy random generator given."""

    def __init__(self, rng: np.random.Generator, invented_names: float = 0.0):
        self.rng = rng
        self.invented_names = invented_names  # share of `single` names that are no dictionary words
        self.first = list(rng.permutation(FIRST_WORDS))
        self.second = list(rng.permutation(SECOND_WORDS))
        self.values = set()
        self.keys = 0

    def value(self) -> str:
        while True:
            value = str(self.rng.integers(10_000, 100_000))
            if value not in self.values:
                self.values.add(value)
                return value

    def room(self) -> int:
        """How many more names can be drawn without using a word twice."""
        return min(len(self.first), len(self.second))

    def name(self) -> str:
        if self.rng.random() < self.invented_names:
            parts = self.rng.choice(SYLLABLES, size=self.rng.integers(2, 5))
            return "".join(parts).capitalize()
        return f"{self.first.pop()} {self.second.pop()}"

    def _key(self) -> int:
        self.keys += 1
        return self.keys

    def attribute(self) -> str:
        return self.rng.choice(ATTRIBUTES)

    def statement(self, attribute, name, value) -> str:
        return plain_fact(attribute, name, value)

    def _plain(self, task, name) -> FactSet:
        attribute, value, key = self.attribute(), self.value(), self._key()
        text = self.statement(attribute, name, value)
        question = f"What is the {attribute} of {name}?"
        return FactSet([Fact(text, key)], [Question(task, question, value, key)])

    def single(self) -> FactSet:
        return self._plain("single", self.name())

    def multi_key(self) -> FactSet:
        """Four names over two first and two second words; one attribute, four questions."""
        a, b = self.first.pop(), self.first.pop()
        c, d = self.second.pop(), self.second.pop()
        attribute = self.attribute()
        result = FactSet([], [])
        for name in (f"{a} {c}", f"{a} {d}", f"{b} {c}", f"{b} {d}"):
            value, key = self.value(), self._key()
            text = self.statement(attribute, name, value)
            result.facts.append(Fact(text, key))
            result.questions.append(
                Question("multi_key", f"What is the {attribute} of {name}?", value, key)
            )
        return result

    def multi_value(self) -> FactSet:
        name, key = self.name(), self._key()
        values = [self.value() for _ in ORDINALS]
        facts = [
            Fact(
                f"The {o} reading at {name} was {v}. Note, at {name} the {o} reading was {v}.", key
            )
            for o, v in zip(ORDINALS, values)
        ]
        question = f"What were the first, second and third readings at {name}?"
        return FactSet(facts, [Question("multi_value", question, ", ".join(values), key)])

    def last_update(self) -> FactSet:
        name, key = self.name(), self._key()
        facts = []
        for i in range(1, self.rng.integers(2, MAX_REVISIONS + 1) + 1):
            value = self.value()
            text = (
                f"Revision {i} sets the limit of {name} to {value}. "
                f"Thus, after revision {i} the limit of {name} is {value}."
            )
            facts.append(Fact(text, key, order=i))
        question = f"What is the limit of {name} after the last revision?"
        return FactSet(facts, [Question("last_update", question, value, key)])

    def draw(self, task: str) -> FactSet:
        return getattr(self, task)()


class VariedGenerator(Generator):
    """Facts of more kinds, for training only: what is evaluated are the Generator's.

    Values of three to seven digits (a range for each document), names and attributes of any `words`
    in many forms, one fact in three said once.
    """

    NAME_FORMS = (
        "{a} {b}",
        "the {a} {b}",
        "the {a}",
        "{A}",
        "{A} {B}",
        "{a} {n}",
        "the {a} {b} {c}",
        "{A} of {B}",
    )
    NUMBERS = "one two three four five six seven eight nine ten".split()
    KINDS = "code number token price key date size count index rate".split()
    SAID_ONCE, OTHER_ATTRIBUTE, OTHER_NAME, INVENTED = 0.35, 0.4, 0.5, 0.15

    def __init__(self, rng: np.random.Generator, words):
        super().__init__(rng, self.INVENTED)
        self.words, self.names = words, set()
        self.digits = sorted(rng.integers(3, 8, size=2).tolist())

    def value(self) -> str:
        while True:
            digits = int(self.rng.integers(self.digits[0], self.digits[1] + 1))
            value = str(self.rng.integers(10 ** (digits - 1), 10**digits))
            if value not in self.values:
                self.values.add(value)
                return value

    def name(self) -> str:
        while True:
            name = self._other_name() if self.rng.random() < self.OTHER_NAME else super().name()
            if name not in self.names:
                self.names.add(name)
                return name

    def _other_name(self) -> str:
        a, b, c = (str(w) for w in self.rng.choice(self.words, size=3, replace=False))
        form, number = self.rng.choice(self.NAME_FORMS), self.rng.choice(self.NUMBERS)
        return form.format(a=a, b=b, c=c, n=number, A=a.capitalize(), B=b.capitalize())

    def attribute(self) -> str:
        if self.rng.random() >= self.OTHER_ATTRIBUTE:
            return super().attribute()
        return f"{self.rng.choice(self.words)} {self.rng.choice(self.KINDS)}"

    def statement(self, attribute, name, value) -> str:
        text = super().statement(attribute, name, value)
        return text[: text.index(". ") + 1] if self.rng.random() < self.SAID_ONCE else text


def merge(sets) -> FactSet:
    return FactSet([f for s in sets for f in s.facts], [q for s in sets for q in s.questions])


@dataclasses.dataclass
class Plan:
    """A document: filler units [start, stop) with a text planted before some of them."""

    start: int
    stop: int
    planted: list  # (unit index, text with its leading separator), ascending


def plan_document(rng, unit_tokens, line_start, facts, budget, count) -> Plan:
    """Chooses a stretch of filler and a place for each fact: at most `budget` tokens in all.

    unit_tokens  [n + 1] running sum of the filler units' token counts
    line_start   [n] the first unit of each unit's line; a document begins with a line
    count        text -> number of tokens
    """
    texts = [("\n" if rng.random() < 0.5 else " ") + f.text for f in facts]
    room = budget - sum(count(t) for t in texts)
    if room < LEAST_FILLER or room > unit_tokens[-1]:
        raise ValueError(
            f"plan_document: {room} tokens of filler wanted; the text has "
            f"{unit_tokens[-1]}, the budget is {budget} with {len(facts)} facts"
        )
    last_start = int(np.searchsorted(unit_tokens, unit_tokens[-1] - room, side="right")) - 1
    start = stop = 0
    while stop == start:  # a first unit longer than the room: draw again
        start = int(line_start[rng.integers(0, last_start + 1)])
        stop = int(np.searchsorted(unit_tokens, unit_tokens[start] + room, side="right")) - 1
    # Units are uneven, so draw places by token position: every part of the document is as likely.
    spots = unit_tokens[start] + rng.random(len(facts)) * (unit_tokens[stop] - unit_tokens[start])
    places = np.clip(np.searchsorted(unit_tokens, spots), start + 1, stop)
    for key in {f.key for f in facts if f.order >= 0}:  # revisions stand in their order
        rows = [i for i, f in enumerate(facts) if f.key == key]
        rows.sort(key=lambda i: facts[i].order)
        places[rows] = np.sort(places[rows])
    order = sorted(range(len(facts)), key=lambda i: (places[i], facts[i].order))
    return Plan(start, stop, [(int(places[i]), texts[i]) for i in order])


def render_text(plan: Plan, units) -> str:
    """The document as text. The very first separator is dropped."""
    parts, at = [], plan.start
    for place, text in plan.planted:
        parts += units[at:place]
        parts.append(text)
        at = place
    parts += units[at : plan.stop]
    return "".join(parts)[1:]
