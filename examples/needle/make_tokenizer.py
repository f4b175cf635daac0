# SPDX-License-Identifier: Apache-2.0
"""Trains the tokenizer and writes its files in the layout of a Llama / MiniCPM4 checkpoint.

    python3 examples/needle/make_tokenizer.py --text .train/text/train --out models/needle-32k

SentencePiece BPE with byte fallback, single digits, identity normalisation, <unk> <s> </s> = 0 1 2,
then the eight added tokens of MiniCPM4. tokenizer.json states the same merges for PyPI
`tokenizers`; `check` proves that both give the same ids.
"""

import argparse
import io
import json
import pathlib
import random

import corpus
import facts
import numpy as np
import sentencepiece

PIECES = 4088  # with the 8 added tokens: 4096
ADDED = (
    "<|im_end|>",
    "<|im_start|>",
    "<|tool_call|>",
    "<|execute_start|>",
    "<|execute_end|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}"
    "{% endif %}"
)


def sentences(folder: pathlib.Path, fact_share: float = 0.04):
    """Lines of the training text with generated facts mixed in."""
    rng, np_rng = random.Random(1), np.random.default_rng(1)
    generator = facts.Generator(np_rng)
    for path in sorted(folder.glob("*.txt")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            yield line
            if rng.random() < fact_share:
                if generator.room() < 2:
                    generator = facts.Generator(np_rng)
                drawn = generator.draw(rng.choice(facts.TASKS))
                yield drawn.facts[0].text
                yield drawn.questions[0].text


def train(lines, pieces: int = PIECES) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        split_digits=True,
        split_by_whitespace=True,
        allow_whitespace_only_pieces=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        character_coverage=0.9999,
        max_sentence_length=16384,
        input_sentence_size=400_000,
        shuffle_input_sentence=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
    )
    return model.getvalue()


def added_token(token_id: int, content: str) -> dict:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def tokenizer_json(processor) -> dict:
    """The `tokenizers` form: merges are the splits of every piece, best (lowest id) piece first."""
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    ranked = []
    for piece, token_id in vocab.items():
        if processor.is_byte(token_id) or processor.is_control(token_id) or token_id == 0:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append(
                    (-processor.get_score(token_id), vocab[left], vocab[right], left, right)
                )
    ranked.sort(key=lambda m: m[:3])
    added = [
        added_token(i, vocab_piece) for vocab_piece, i in (("<unk>", 0), ("<s>", 1), ("</s>", 2))
    ]
    added += [added_token(len(vocab) + i, content) for i, content in enumerate(ADDED)]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[left, right] for *_, left, right in ranked],
        },
    }


def write(out: pathlib.Path, model: bytes, max_length: int):
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    def dump(name, value):
        text = json.dumps(value, ensure_ascii=False, indent=2)
        (out / name).write_text(text + "\n", encoding="utf-8")

    document = tokenizer_json(processor)
    dump("tokenizer.json", document)
    dump(
        "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(t["id"]): {k: v for k, v in t.items() if k != "id"}
                for t in document["added_tokens"]
            },
            "additional_special_tokens": list(ADDED),
            "bos_token": "<s>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "legacy": True,
            "model_max_length": max_length,
            "pad_token": None,
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )
    dump(
        "special_tokens_map.json",
        {
            "additional_special_tokens": list(ADDED),
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "unk_token": "<unk>",
        },
    )


def check(out: pathlib.Path, text_folder: pathlib.Path, lines: int = 20_000) -> int:
    """Number of held-out lines on which tokenizer.model and tokenizer.json disagree."""
    import tokenizers

    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    fast = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    differences = 0
    for path in sorted(text_folder.glob("*.txt")):
        for line in path.read_text(encoding="utf-8").split("\n")[:lines]:
            differences += processor.encode(line) != fast.encode(line, add_special_tokens=False).ids
    return differences


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=pathlib.Path, default=pathlib.Path(".train/text"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("models/needle-32k"))
    parser.add_argument("--max-length", type=int, default=131072)
    args = parser.parse_args()
    write(args.out, train(sentences(args.text / "train")), args.max_length)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(args.out / "tokenizer.model"))
    for source in corpus.SOURCES["heldout"]:
        text = (args.text / "heldout" / f"{source.package}.txt").read_text(encoding="utf-8")
        print(f"{source.package}: {len(text) / len(processor.encode(text)):.2f} characters a token")
    print(f"held-out lines that differ: {check(args.out, args.text / 'heldout')}")


if __name__ == "__main__":
    main()
