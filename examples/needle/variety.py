# SPDX-License-Identifier: Apache-2.0
"""Facts of more kinds, for training only: the evaluation's facts are those of facts.py.

Values have three to seven digits, a third of the facts is said once, names are words of the real
text in many forms, and attributes too. Without them the model insists on five digits and on names
of two dictionary words.
"""

import facts

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


class VariedGenerator(facts.Generator):
    """words: plain words to make names and attributes of."""

    def __init__(self, rng, words):
        super().__init__(rng, INVENTED)
        self.words, self.names = words, set()
        digits = rng.integers(3, 8, size=2)
        self.digits = (int(digits.min()), int(digits.max()))

    def value(self):
        while True:
            digits = int(self.rng.integers(self.digits[0], self.digits[1] + 1))
            value = str(self.rng.integers(10 ** (digits - 1), 10**digits))
            if value not in self.values:
                self.values.add(value)
                return value

    def name(self):
        while True:
            name = self._other_name() if self.rng.random() < OTHER_NAME else super().name()
            if name not in self.names:
                self.names.add(name)
                return name

    def _other_name(self):
        a, b, c = (str(w) for w in self.rng.choice(self.words, size=3, replace=False))
        form = NAME_FORMS[self.rng.integers(len(NAME_FORMS))]
        number = NUMBERS[self.rng.integers(len(NUMBERS))]
        return form.format(a=a, b=b, c=c, n=number, A=a.capitalize(), B=b.capitalize())

    def attribute(self):
        if self.rng.random() >= OTHER_ATTRIBUTE:
            return super().attribute()
        return f"{self.rng.choice(self.words)} {self.rng.choice(KINDS)}"

    def said(self, first, second):
        return first if self.rng.random() < SAID_ONCE else super().said(first, second)
