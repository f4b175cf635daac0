# SPDX-License-Identifier: Apache-2.0
"""Facts planted in document.txt, as trained and not as trained: how far the skill reaches.

    python3 examples/needle/make_variations.py --out .train/variations.jsonl

Same form as make_cases.py, with the kind of fact as the task:

    alone          one fact in the whole document, as in `make demo`
    said_once      "The pass code of grey fox is 48213." and no second sentence
    own_line_end   the fact in a line of its own after another sentence
    invented       a name that is no dictionary word
    other_name     a name that is not two words: "the main vault"
    other_thing    not one of the four attributes: "access token"
    four_digits, six_digits
"""

import argparse
import json
import pathlib

import facts
import numpy as np
import samples

HERE = pathlib.Path(__file__).parent
OTHER_NAMES = ("the main vault", "Alice", "station seven", "the old post office", "Marseille")
OTHER_THINGS = ("access token", "badge number", "tax number", "zip code", "order number")
QUESTION = "What is the {} of {}?"
SEED = 20_261_123


def variations(rng):
    """(kind, statement, question, answer) of five facts a kind."""
    generator = facts.Generator(rng)
    for i in range(5):
        attribute, name = str(rng.choice(facts.ATTRIBUTES)), generator.name()
        value = generator.value()
        once = f"The {attribute} of {name} is {value}."
        yield "said_once", once, QUESTION.format(attribute, name), value
        name, value = generator.name(), generator.value()
        text = "This is worth a note. " + facts.plain_fact(attribute, name, value)
        yield "own_line_end", text, QUESTION.format(attribute, name), value
        name = "".join(rng.choice(facts.SYLLABLES, size=3)).capitalize()
        kinds = (
            ("invented", attribute, name, generator.value()),
            ("other_name", attribute, OTHER_NAMES[i], generator.value()),
            ("other_thing", OTHER_THINGS[i], generator.name(), generator.value()),
            ("four_digits", attribute, generator.name(), str(rng.integers(1000, 10_000))),
            ("six_digits", attribute, generator.name(), str(rng.integers(100_000, 1_000_000))),
        )
        for kind, thing, owner, number in kinds:
            statement = facts.plain_fact(thing, owner, number)
            yield kind, statement, QUESTION.format(thing, owner), number


def plant(rng, lines, statements):
    """The lines with each statement as a line of its own, somewhere."""
    result = list(lines)
    for place, statement in sorted(zip(rng.integers(1, len(lines), len(statements)), statements)):
        result.insert(int(place), statement)
    return "\n".join(result)


def cases(text, codec, documents):
    lines = text.rstrip("\n").split("\n")
    for number in range(documents):
        rng = np.random.default_rng([SEED, number])
        single = facts.Generator(rng).single()
        alone = (
            "alone",
            single.facts[0].text,
            single.questions[0].text,
            single.questions[0].answer,
        )
        for group in ([alone], list(variations(rng))):
            document = plant(rng, lines, [statement for _, statement, _, _ in group])
            longest = max(len(codec.ask(question)) for _, _, question, _ in group)
            tokens = 2 + len(codec.segment("user\n" + document)) + longest
            yield {
                "id": f"{group[0][0]}-{number:03}",
                "length": -(-tokens // 1024) * 1024,
                "tokens": tokens,
                "document": document,
                "questions": [
                    {"task": kind, "question": question, "answer": answer}
                    for kind, _, question, answer in group
                ],
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", default="models/needle-32k/tokenizer.model")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".train/variations.jsonl"))
    parser.add_argument("--documents", type=int, default=40)
    args = parser.parse_args()
    text = (HERE / "document.txt").read_text(encoding="utf-8")
    with open(args.out, "w", encoding="utf-8") as out:
        for case in cases(text, samples.Codec(args.tokenizer), args.documents):
            print(json.dumps(case, ensure_ascii=False), file=out)


if __name__ == "__main__":
    main()
