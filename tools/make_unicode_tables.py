# SPDX-License-Identifier: Apache-2.0
"""Writes infllm/engine/unicode_tables.cc: the character classes that text code asks about.

The classes are measured, not taken from a list: a tokenizer.json means what the `tokenizers` package
makes of it, and a template means what Python makes of it, so each code point is put to them.

    pip install tokenizers
    python tools/make_unicode_tables.py
"""
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

OUTPUT = Path(__file__).resolve().parent.parent / "infllm/engine/unicode_tables.cc"
CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def by_regex(pattern):
    """Code points that one character of `pattern` matches, asked in blocks."""
    split = pre_tokenizers.Split(Regex(pattern + "+"), "removed")
    found = set()
    for start in range(0, len(CODES), 4096):
        block = CODES[start:start + 4096]
        kept = set("".join(text for text, _ in split.pre_tokenize_str("".join(map(chr, block)))))
        found.update(code for code in block if chr(code) not in kept)
    return found


def word_characters():
    """Characters that keep a single_word token from matching beside them."""
    tokenizer = Tokenizer(models.BPE(vocab={"?": 0}, merges=[], unk_token="?", fuse_unk=True))
    tokenizer.add_tokens([AddedToken("\u0001", single_word=True, normalized=False)])
    token = tokenizer.token_to_id("\u0001")
    found = set()
    for code in CODES:
        if code != 1 and token not in tokenizer.encode(chr(code) + "\u0001").ids:
            found.add(code)
    return found


def bounds(codes):
    out, previous = [], None
    for code in sorted(codes):
        if previous is None or code != previous + 1:
            if previous is not None:
                out.append(previous + 1)
            out.append(code)
        previous = code
    if previous is not None:
        out.append(previous + 1)
    return out


def main():
    unprintable = {code for code in range(0x110000) if not chr(code).isprintable()}
    tables = {
        "kLetters": by_regex(r"\p{L}"),
        "kNumbers": by_regex(r"\p{N}"),
        "kWord": word_characters(),
        "kUnprintable": unprintable,
    }
    lines = [
        "// SPDX-License-Identifier: Apache-2.0",
        "//",
        "// Written by tools/make_unicode_tables.py; change that script, not this file. A table lists",
        "// where its class begins and ends in turn: [first, one past the last), and so on.",
        '#include "infllm/engine/unicode_tables.h"',
        "",
        "#include <algorithm>",
        "#include <iterator>",
        "",
        "namespace infllm::engine {",
        "namespace {",
        "",
        "// clang-format off",
    ]
    for name, codes in tables.items():
        lines.append(f"constexpr char32_t {name}[] = {{")
        row = "   "
        for bound in bounds(codes):
            if len(row) + len(str(bound)) + 2 > 100:
                lines.append(row)
                row = "   "
            row += f" {bound},"
        lines += [row, "};"]
    lines.append("// clang-format on")
    lines.append("""
template <std::size_t kSize>
bool in_table(const char32_t (&table)[kSize], char32_t code) {
  const auto* after = std::upper_bound(std::begin(table), std::end(table), code);
  return (after - std::begin(table)) % 2 == 1;
}

}  // namespace

bool is_letter(char32_t code) { return in_table(kLetters, code); }
bool is_number(char32_t code) { return in_table(kNumbers, code); }
bool is_word(char32_t code) { return in_table(kWord, code); }
bool is_printable(char32_t code) { return !in_table(kUnprintable, code); }

}  // namespace infllm::engine
""")
    OUTPUT.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
