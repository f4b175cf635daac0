# SPDX-License-Identifier: Apache-2.0
"""Writes tests/golden/text: what the PyPI packages make of many texts, for the tests to agree with.

    pip install tokenizers sentencepiece protobuf jinja2
    python tools/make_text_golden.py

Small tokenizers of several families are trained, and 20,000 strings are encoded and decoded with each.
The strings are not stored: both sides build them from atoms.txt by the rule of `string_of`, and the
golden files hold one hash a string. Templates are rendered over conversations built the same way.
"""
import io
import json
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as spm_proto
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)

GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden/text"
STRINGS = 20_000
RANDOM_ID_LISTS = 2_000
MASK = (1 << 64) - 1
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
CHATML = ["<|im_end|>", "<|im_start|>", "<|tool_call|>"]


# ---- what the tests do too -----------------------------------------------------------------------

class SplitMix:
    """The generator of both sides (Steele, Lea, Flood 2014)."""

    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, n):
        return self.next() % n


def string_of(index, atoms):
    """Some atoms in a row; every eighth string repeats one of them instead, many times."""
    random = SplitMix(index)
    if index % 8 == 7:
        return atoms[random.below(len(atoms))] * (1 + random.below(64))
    return b"".join(atoms[random.below(len(atoms))] for _ in range(random.below(24)))


def hash_of(data):
    """FNV-1a, folded to 24 bits."""
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return (h ^ (h >> 24) ^ (h >> 48)) & 0xFFFFFF


def hash_ids(ids):
    return hash_of(b"".join(i.to_bytes(4, "little") for i in ids))


def repair(data):
    """UTF-8 with one U+FFFD for each byte that belongs to no character."""
    import codecs
    codecs.register_error("per_byte", lambda error: ("\ufffd", error.start + 1))
    return data.decode("utf-8", errors="per_byte")


# ---- texts ---------------------------------------------------------------------------------------

WORDS = """the of and to in is was that needle hidden document answer question attention block window
sparse dense key value score select MiniCPM tokens internationalisation antidisestablishmentarianism
it's don't we'll they're I've he'd I'm IT'S DON'T WE'LL o'clock rock'n'roll hello world Hello World HELLO
def return import class None True lambda async await 3.14159 42 007 1234567890 0x1F 1e-7 100% $5.00
user@example.com https://example.com/a?b=c&d=e#f C:\\temp\\x --flag a_b_c camelCase snake_case
\u00fcber stra\u00dfe na\u00efve \u00e9cole \u017fs caf\u00e9 cafe\u0301 \u0130stanbul
\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u0394\u03bf\u03ba\u03b9\u03bc\u03ae
\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947
\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \uc548\ub155\ud558\uc138\uc694 \u3053\u3093\u306b\u3061\u306f
\u30ab\u30bf\u30ab\u30ca \uff76\uff85 \u4f60\u597d\u4e16\u754c \u6ce8\u610f\u529b \u7a00\u758f
\u10d2\u10d0\u10db\u10d0\u10e0\u10ef\u10dd\u10d1\u10d0 \u12a0\u121b\u122d\u129b \u0bb5\u0ba3\u0b95\u0bcd
\U0001d54f \u216b \u00bd \u0663\u0664 \u2460 \uff11\uff12 \ufb01 \u2126 \u212b \uff21""".split()

EXTRAS = [
    " ", " ", " ", " ", "  ", "   ", "        ", "\n", "\n\n", "\r\n", "\r", "\t", "\t\t", " \n", "\n ",
    "\u00a0", "\u3000", "\u2003", "\u200b", "\u200d", "\u2028", "\ufeff", "\x00", "\x1c", "\x7f", "\u0085",
    ".", ",", "!", "?", "...", "!!!", "'", "''", "\"", "-", "--", "\u2014", "_", "#", "##", "()", "[]",
    "{}", "=>", "==", "/*", "*/", "//", "<", ">", "&", "|", "<|", "|>", "\\", "\\n", "`", "```",
    "\u2581", "\u2581\u2581", "\u2581a", "<0x0A>", "<0xFF>", "<unk>", "<s>", "</s>", "<pad>",
    *CHATML, " <|im_end|> ", "<|im_start|>user\n", "[DAY]", "  [DAY]  ", "[LEFT]", " [LEFT]", "[RIGHT]  ",
    "day", "today", " day ", "Tok Tok", "\ufffd", "\U0010ffff", "\U000e0001",
    "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "\u2764\ufe0f",
    "\U0001f1e9\U0001f1ea", "e\u0301", "o\u0308\u0304", "\u0f40\u0f71\u0f72", "Z\u0351\u036b\u0343",
    "a", "b", "ab", "aab", "ba", "aaaa", "abab", "0", "00", "1", "12", "123", "1234",
]
BROKEN = [b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\x80", b"\xc0\xaf", b"\xed\xa0\x80",
          b"\xf4\x90\x80\x80", b"\xe2\x96", b"caf\xc3", b"\xfe\xfe"]


def make_atoms():
    spaced = [" " + word for word in WORDS]
    return [text.encode() for text in WORDS + spaced + EXTRAS * 2] + BROKEN


def training_text():
    """Licence texts of a Debian machine where there are some, and sentences of our own words."""
    random = SplitMix(2026)
    lines = []
    for path in sorted(Path("/usr/share/common-licenses").glob("*")):
        lines += [line.strip() for line in path.read_text(errors="ignore").splitlines() if line.strip()]
    for _ in range(4_000):
        count = 3 + random.below(12)
        lines.append(" ".join(WORDS[random.below(len(WORDS))] for _ in range(count)))
    return lines


# ---- tokenizers ----------------------------------------------------------------------------------

def train_sentencepiece(lines, vocab, **options):
    out = io.BytesIO()
    defaults = dict(model_type="bpe", vocab_size=vocab, character_coverage=0.9995, byte_fallback=True,
                    normalization_rule_name="identity", remove_extra_whitespaces=False,
                    add_dummy_prefix=True, split_digits=True, allow_whitespace_only_pieces=True,
                    minloglevel=2, num_threads=1)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out,
                                             **{**defaults, **options})
    proto = spm_proto.ModelProto.FromString(out.getvalue())
    proto.trainer_spec.ClearField("input")
    return proto


def llama_json(proto, legacy):
    """The tokenizer.json that a Llama-style SentencePiece model is published with."""
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    score = {piece.piece: piece.score for piece in proto.pieces}
    merges = []
    for text, rank in sorted(score.items(), key=lambda item: -item[1]):
        if proto.pieces[vocab[text]].type != 1:
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                merges.append((left, right, vocab[left], vocab[right], rank))
    merges.sort(key=lambda m: (-m[4], m[2], m[3]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(m[0], m[1]) for m in merges],
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tail = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), *tail])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ["<unk>", "<s>", "</s>"]])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in CHATML])
    tokenizer.add_tokens([
        AddedToken("[DAY]", normalized=False, lstrip=True, rstrip=True),
        AddedToken("[LEFT]", normalized=False, lstrip=True),
        AddedToken("[RIGHT]", normalized=False, rstrip=True),
        AddedToken("day", normalized=False, single_word=True),
        AddedToken("Tok Tok", normalized=True),
    ])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocab["<s>"])])
    return tokenizer


def train_metaspace(lines):
    """No byte fallback, so that the unknown token shows; words never merge across spaces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=900, limit_alphabet=120, show_progress=False,
                                  special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def train_byte_level(lines, pattern, ignore_merges):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1200, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ["<s>", *CHATML]])
    if pattern is not None:
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[
                ("<s>", tokenizer.token_to_id("<s>"))])])
    return tokenizer


def string_merges(text):
    """The same tokenizer.json with merges as "left right", the older spelling."""
    data = json.loads(text)
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    return data


# ---- golden files --------------------------------------------------------------------------------

def write_hashes(path, hashes):
    rows = ["".join(f"{h:06x}" for h in hashes[i:i + 16]) for i in range(0, len(hashes), 16)]
    path.write_text("\n".join(rows) + "\n")


def random_ids(index, allowed):
    random = SplitMix(index)
    return [allowed[random.below(len(allowed))] for _ in range(random.below(20))]


def write_tokenizer(name, encode, decode, allowed, atoms):
    """A hash of each string's ids; of their texts and of those of arbitrary ids one for every eight."""
    folder = GOLDEN / name
    ids = [encode(string_of(i, atoms)) for i in range(STRINGS)]
    write_hashes(folder / "ids.txt", [hash_ids(row) for row in ids])
    keep = set(allowed)
    texts = [decode([i for i in row if i in keep]) for row in ids]
    texts += [decode(random_ids(i, allowed)) for i in range(RANDOM_ID_LISTS)]
    eights = ["".join(text + "\0" for text in texts[i:i + 8]) for i in range(0, len(texts), 8)]
    write_hashes(folder / "texts.txt", [hash_of(text.encode()) for text in eights])
    (folder / "random_ids.txt").write_text(" ".join(map(str, allowed)) + "\n")
    samples = [{"string": string_of(i, atoms).hex(), "ids": ids[i]} for i in range(24)]
    rows = ",\n ".join(json.dumps(sample) for sample in samples)
    (folder / "samples.json").write_text(f"[{rows}]\n")


def write_sentencepiece(name, proto, atoms):
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    allowed = [i for i, piece in enumerate(proto.pieces) if piece.type != 2]
    write_tokenizer(name, processor.encode, processor.decode, allowed, atoms)


def write_json(name, tokenizer, atoms, old_merges=False):
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    text = tokenizer.to_str()
    data = string_merges(text) if old_merges else json.loads(text)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")))
    # Runs of byte tokens that are no UTF-8 are decoded otherwise on purpose: see tokenizer.h.
    allowed = [i for text, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
               if not (text.startswith("<0x") and len(text) == 6) and text != "<unk>"]
    write_tokenizer(name, lambda data: tokenizer.encode(repair(data)).ids, tokenizer.decode, allowed,
                    atoms)


def write_tokenizers():
    atoms = make_atoms()
    GOLDEN.mkdir(parents=True, exist_ok=True)
    (GOLDEN / "atoms.txt").write_text("\n".join(atom.hex() for atom in atoms) + "\n")
    lines = training_text()
    llama = train_sentencepiece(lines, 1400)
    write_sentencepiece("spm_llama", llama, atoms)
    bare = train_sentencepiece(lines, 1000, add_dummy_prefix=False, split_digits=False,
                               user_defined_symbols=["<|im_start|>", "<|im_end|>", "Tok Tok", "  "])
    for piece in list(bare.pieces)[400:440]:  # pieces that merge but must not appear
        piece.type = 5
    write_sentencepiece("spm_bare", bare, atoms)
    nfkc = train_sentencepiece(lines, 800, normalization_rule_name="nmt_nfkc", byte_fallback=False,
                               remove_extra_whitespaces=True)
    write_sentencepiece("spm_nfkc", nfkc, atoms)
    write_json("json_llama", llama_json(llama, legacy=True), atoms, old_merges=True)
    write_json("json_llama_first", llama_json(llama, legacy=False), atoms)
    write_json("json_metaspace", train_metaspace(lines), atoms)
    write_json("json_llama3", train_byte_level(lines, LLAMA3, ignore_merges=True), atoms)
    write_json("json_qwen2", train_byte_level(lines, QWEN2, ignore_merges=False), atoms)
    write_json("json_gpt2", train_byte_level(lines, None, ignore_merges=False), atoms)



# ---- templates -----------------------------------------------------------------------------------

CONVERSATIONS = 1_000
ROLES = ["system", "user", "assistant", "tool", "developer"]
TOOLS = [
    {"type": "function", "function": {"name": "search", "description": "Finds a \"needle\" <fast> & well",
     "parameters": {"type": "object", "properties": {"query": {"type": "string"}, "top_k": {
         "type": "integer", "default": 5, "enum": [1, 5, 10]}}, "required": ["query"]}}},
    {"type": "function", "function": {"name": "clock", "description": "\u65f6\u949f \U0001f550",
     "parameters": {"type": "object", "properties": {}, "strict": True, "scale": 0.5, "none": None}}},
]
CONTENTS = ["Hello", " leading", "trailing \n", "", "two\n\nparagraphs", "quote ' and \" and \\",
            "<think>\nreasoning\n</think>\n\nanswer", "no open</think>rest", "\u4f60\u597d\uff01",
            "<|im_end|>", "{{ not a tag }} {% nor this %}", "emoji \U0001f600 \u200b\u00a0", "/no_think",
            "What is 2 + 2? /think", "tab\there", "<tool_response>1</tool_response>", "a" * 200, "\x00\x1f"]


def conversation(index):
    random = SplitMix(10_000 + index)
    messages = []
    if random.below(2):
        messages.append({"role": "system", "content": CONTENTS[random.below(len(CONTENTS))]})
    for turn in range(random.below(7)):
        role = ["user", "assistant"][turn % 2] if random.below(8) else ROLES[random.below(len(ROLES))]
        message = {"role": role, "content": CONTENTS[random.below(len(CONTENTS))]}
        if role == "assistant" and random.below(4) == 0:
            arguments = {"query": CONTENTS[random.below(len(CONTENTS))], "n": random.below(100),
                         "x": random.below(1000) / 8, "flag": bool(random.below(2)), "list": [1, "a", None]}
            message["tool_calls"] = [{"id": f"call_{turn}", "type": "function", "function": {
                "name": "search", "arguments": arguments if random.below(2) else json.dumps(arguments)}}]
            if random.below(2):
                message["content"] = None
        if role == "assistant" and random.below(4) == 0:
            message["reasoning_content"] = CONTENTS[random.below(len(CONTENTS))]
        if role == "user" and random.below(8) == 0:
            message["content"] = [{"type": "text", "text": CONTENTS[random.below(len(CONTENTS))]},
                                  {"type": "image"}, {"type": "text", "text": "end"}]
        messages.append(message)
    variables = {}
    if random.below(3) == 0:
        variables["tools"] = TOOLS[:1 + random.below(2)]
    if random.below(3) == 0:
        variables["documents"] = [{"title": "T", "text": CONTENTS[random.below(len(CONTENTS))]}]
    return {"messages": messages, "add_generation_prompt": bool(random.below(2)),
            "enable_thinking": [None, True, False][random.below(3)], "variables": variables}


def make_environment():
    """Jinja as transformers sets it up for chat templates."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def render(environment, template, variables):
    """The text, None when rendering fails."""
    try:
        return environment.from_string(template).render(**variables)
    except Exception:  # jinja2 and the Python under it raise many kinds
        return None


def write_templates():
    environment = make_environment()
    folder = GOLDEN / "templates"
    conversations = [conversation(i) for i in range(CONVERSATIONS)]
    rows = [json.dumps(c, ensure_ascii=False, separators=(",", ":")) for c in conversations]
    (folder / "conversations.jsonl").write_text("\n".join(rows) + "\n")
    for path in sorted(folder.glob("*.jinja")):
        template = path.read_text()
        hashes = []
        for c in conversations:
            variables = {"bos_token": "<s>", "eos_token": "</s>", "messages": c["messages"],
                         "add_generation_prompt": c["add_generation_prompt"], **c["variables"]}
            if c["enable_thinking"] is not None:
                variables["enable_thinking"] = c["enable_thinking"]
            text = render(environment, template, variables)
            hashes.append(0 if text is None else hash_of(text.encode()))
        write_hashes(path.with_suffix(".hashes.txt"), hashes)
    snippets = [line for line in (folder / "snippets.txt").read_text().split("\n----\n")]
    variables = json.loads((folder / "snippet_variables.json").read_text())
    outputs = [render(environment, snippet, variables) for snippet in snippets]
    (folder / "snippets.json").write_text(
        json.dumps([{"template": s, "output": o} for s, o in zip(snippets, outputs)], indent=0) + "\n")


if __name__ == "__main__":
    write_tokenizers()
    write_templates()
