# SPDX-License-Identifier: Apache-2.0
r"""Token ids of training samples and of evaluation cases.

    <s><|im_start|>user\nDOCUMENT\n\nQUESTION<|im_end|>\n<|im_start|>assistant\nLEAD ITEM ITEM ...<|im_end|>

with more turns behind in training. The document is filler, tokenised once (Hay), with facts planted
between its sentences; or a list of texts that a task brings along.

    python3 examples/adapt/documents.py --config CONFIG     # text -> .train/adapt/data
"""

import argparse
import collections
import dataclasses
import multiprocessing
import os
import pathlib
import re

import numpy as np
import ruler
import settings
import text
from needle import facts, samples

PAD, REST, ANSWER = samples.PAD, samples.REST, samples.ANSWER  # ANSWER + i: an answer of task i
WORD = re.compile(r"\b[a-z]{4,9}\b")


@dataclasses.dataclass
class Sample:
    """tokens, kinds [length + 1]; items: (task, choices, first, last).

    first, last: places of the expected tokens; choices: all that would do there, if any order would.
    """

    tokens: np.ndarray
    kinds: np.ndarray
    items: list


class Filler:
    """Tokenised text of one split: mapped, so that many workers share it."""

    def __init__(self, folder: pathlib.Path, split: str):
        tokens, units, starts = (
            np.load(folder / f"{split}-{name}.npy", mmap_mode="r")
            for name in ("tokens", "units", "starts")
        )
        self.hay = samples.Hay(tokens, units, starts)
        self.words = np.array((folder / "words.txt").read_text(encoding="utf-8").split())


class Maker:
    """Makes samples; one a process."""

    def __init__(self, tokenizer, filler: Filler):
        self.codec = samples.Codec(tokenizer)
        self.filler, self.hay = filler, filler.hay
        self.noise = [self.codec.inner(" " + sentence) for sentence in ruler.NOISE]

    def turns(self, turns):
        """Ids, kinds and items of everything behind the document; the first token is number 0."""
        codec, ids, kinds, items = self.codec, [], [], []

        def put(part, kind):
            ids.extend(part)
            kinds.extend([kind] * len(part))

        for number, turn in enumerate(turns):
            kind = ANSWER + ruler.TASKS.index(turn.task)
            choices = []
            if turn.any_order:
                choices = [self.codec.inner(" " + item)[0] for item in turn.items]
            put(codec.ask_again(turn.question) if number else codec.ask(turn.question), REST)
            put(codec.inner("\n" + turn.lead)[1:], REST)
            for i, item in enumerate(turn.items):
                first = len(ids)
                put(codec.inner(" " + str(item)), kind)
                items.append((turn.task, choices[i:], first, len(ids)))
            put([codec.im_end], kind)
        return ids, kinds, items

    def lines(self, rng, filler, planted, room):
        """Ids of a document of given texts, or of noise, with facts at random places in it."""
        if filler == "noise":
            phase, pieces = int(rng.integers(len(self.noise))), []
            room_left = room - sum(self.codec.count(" " + f.text) for f in planted)
            while room_left > 0:
                pieces.append(self.noise[phase % len(self.noise)])
                room_left -= len(pieces[-1])
                phase += 1
            pieces = pieces[:-1]
        else:
            pieces = [self.codec.inner(piece) for piece in filler]
        places = rng.integers(1, len(pieces) + 1, len(planted))
        for key in {f.key for f in planted if f.order >= 0}:
            rows = [i for i, f in enumerate(planted) if f.key == key]
            places[rows] = np.sort(places[rows])
        for i in sorted(range(len(planted)), key=lambda i: (places[i], planted[i].order))[::-1]:
            pieces.insert(int(places[i]), self.codec.inner(" " + planted[i].text))
        return np.fromiter((t for piece in pieces for t in piece), np.int64)[:room]

    def document(self, rng, drawn, room):
        if drawn.filler != "text":
            return self.lines(rng, drawn.filler, drawn.facts, room)
        plan = facts.plan_document(
            rng, self.hay.unit_tokens, self.hay.line_start, drawn.facts, room, self.codec.count
        )
        return samples.render_tokens(plan, self.hay, self.codec)

    def plain(self, rng, length):
        """Nothing but text: <s> and `length` tokens from a random line on."""
        last = np.searchsorted(self.hay.unit_tokens, len(self.hay.tokens) - length - 1) - 1
        at = self.hay.unit_tokens[self.hay.line_start[rng.integers(0, last)]]
        tokens = np.concatenate([[self.codec.bos], self.hay.tokens[at : at + length]])
        return Sample(tokens.astype(np.int64), np.full(length + 1, REST), [])

    def finish(self, rng, drawn, length):
        head = self.codec.head()
        tail, kinds, items = self.turns(drawn.turns)
        room = length + 1 - len(head) - len(tail)
        document = self.document(rng, drawn, room)
        begin, padding = len(head) + len(document), room - len(document)
        tokens = np.concatenate([head, document, tail, np.full(padding, self.codec.eos)])
        kind = np.concatenate([np.full(begin, REST), kinds, np.full(padding, PAD)])
        items = [(task, choices, begin + a, begin + b) for task, choices, a, b in items]
        return Sample(tokens.astype(np.int64), kind.astype(np.int64), items)

    def training(self, rng, length):
        """One training sample of the mixture."""
        count = self.codec.count
        most_turns = int(np.clip(length // 100, 2, 40))
        while True:
            tasks = ruler.Tasks(rng, self.filler.words)
            drawn = tasks.draw_mixture(length - 160 - 48 * most_turns // 2, count, most_turns)
            if not drawn.turns:
                return self.plain(rng, length)
            while True:
                tail = len(self.turns(drawn.turns)[0])
                planted = sum(count(" " + f.text) for f in drawn.facts)
                if tail + planted + 200 <= length or not drawn.turns:
                    break
                drawn.turns.pop()
            if drawn.turns and (drawn.filler in ("text", "noise") or tail + 80 < length):
                return self.finish(rng, drawn, length)

    def case(self, seed, task, length):
        """One evaluation sample of a task; the same for everybody who has the text and tokenizer."""
        rng = np.random.default_rng([seed, ruler.TASKS.index(task), length])
        tasks = ruler.Tasks(rng, self.filler.words)
        drawn = tasks.draw(task, length - 260, self.codec.count)
        return self.finish(rng, drawn, length)


def _tokenise(job):
    """Token ids, their number a unit, and the first unit of each unit's line, of one piece."""
    tokenizer, piece = job
    codec = samples.Codec(tokenizer)
    hay, _ = samples.Hay.build([piece], codec)
    return np.asarray(hay.tokens, np.uint16), np.diff(hay.unit_tokens), hay.line_start


def pieces(document: str, size=1 << 20):
    """Cuts a text at line breaks into pieces of about `size` characters."""
    at = 0
    while at < len(document):
        end = document.find("\n", at + size)
        end = len(document) if end < 0 else end + 1
        if document[at:end].strip("\n"):
            yield document[at:end]
        at = end


def build(texts, tokenizer, folder: pathlib.Path, split: str, processes: int) -> int:
    jobs = [(str(tokenizer), piece) for _, document in texts for piece in pieces(document)]
    with multiprocessing.Pool(processes) as pool:
        parts = pool.map(_tokenise, jobs, chunksize=1)
    tokens, counts, starts = zip(*parts)
    first = np.concatenate([[0], np.cumsum([len(c) for c in counts])[:-1]])
    np.save(folder / f"{split}-tokens.npy", np.concatenate(tokens))
    units = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    np.save(folder / f"{split}-units.npy", units)
    np.save(folder / f"{split}-starts.npy", np.concatenate([s + f for s, f in zip(starts, first)]))
    return len(units) and int(units[-1])


def common_words(texts, codec, most=6000):
    """The list tasks' vocabulary: frequent lower-case words of four to nine letters and one token."""
    counts = collections.Counter()
    for _, document in texts:
        counts.update(WORD.findall(document[:1_000_000]))
    words = (word for word, _ in counts.most_common(most))
    return sorted(word for word in words if codec.count(" " + word) == 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    settings.add_paths(parser)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        texts = text.load(args.text, split)
        total = build(texts, args.tokenizer, args.data, split, args.processes)
        print(f"{split:8} {total / 1e6:7.2f} M tokens", flush=True)
        if split == "train":
            words = " ".join(common_words(texts, samples.Codec(args.tokenizer)))
            (args.data / "words.txt").write_text(words + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
