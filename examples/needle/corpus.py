# SPDX-License-Identifier: Apache-2.0
"""Real text from Debian packages: the hay in which facts are planted.

    python3 examples/needle/corpus.py --out .train/text

downloads the packages named below with `apt-get download`, unpacks them with `dpkg -x` (nothing is
installed), strips the markup and writes one UTF-8 file per package to .train/text/{train,heldout}/.
Training and evaluation read different packages. `units()` cuts such a text into the pieces between
which a fact may be planted.
"""

import argparse
import gzip
import html.parser
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple


class Source(NamedTuple):
    package: str
    licence: str
    globs: tuple  # files inside the unpacked package


SOURCES = {
    "train": (
        Source("postgresql-doc-15", "PostgreSQL", ("usr/share/doc/postgresql-doc-15/html/*.html",)),
        Source(
            "python3.11-doc",
            "PSF-2.0",
            tuple(
                f"usr/share/doc/python3.11/html/{d}/*.html"
                for d in ("library", "reference", "tutorial", "howto", "c-api", "faq", "whatsnew")
            ),
        ),
        Source("apache2-doc", "Apache-2.0", ("usr/share/doc/apache2-doc/manual/en/**/*.html*",)),
        Source("cmake-doc", "BSD-3-Clause", ("usr/share/doc/cmake-data/html/[cmp]*/*.html",)),
        Source(
            "llvm-15-doc",
            "Apache-2.0 WITH LLVM-exception",
            ("usr/share/doc/llvm-15-doc/html/*.html",),
        ),
        Source("jargon-text", "public domain", ("usr/share/doc/jargon-text/jargon.txt.gz",)),
    ),
    "heldout": (
        Source(
            "sqlite3-doc",
            "public domain",
            ("usr/share/doc/sqlite3/*.html", "usr/share/doc/sqlite3/c3ref/*.html"),
        ),
    ),
}

# document.txt: pages of prose from the held-out package, in reading order.
DOCUMENT = Source(
    "sqlite3-doc",
    "public domain",
    tuple(
        f"usr/share/doc/sqlite3/{page}.html"
        for page in ("aff_short", "whentouse", "testing", "atomiccommit")
    ),
)

BLOCKS = frozenset(
    "p div br li ul ol dl dt dd tr table h1 h2 h3 h4 h5 h6 pre section title".split()
)
HIDDEN = frozenset("script style head nav footer noscript svg".split())
LONGEST_UNIT = 400  # characters; longer sentences are cut at a space


class _Text(html.parser.HTMLParser):
    """Collects visible text; block elements become line breaks."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts, self.hidden = [], 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in HIDDEN
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        self.hidden -= tag in HIDDEN and self.hidden > 0
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.parts.append(data)


def plain(raw: bytes, is_html: bool) -> str:
    """Visible text with one paragraph a line, single spaces, no blank lines."""
    text = raw.decode("utf-8", errors="replace")
    if is_html:
        parser = _Text()
        parser.feed(text)
        text = "".join(parser.parts)
    else:  # hard-wrapped: a line break inside a paragraph is a space
        text = re.sub(r"(?<=\S)\n[ \t]*(?=\S)", " ", text)
    text = re.sub(r"[^\S\n]+", " ", text.replace("\u00b6", "").replace("\ufffd", ""))
    lines = (line.strip() for line in text.split("\n"))
    return "\n".join(line for line in lines if len(line) > 1)


def read_package(root: pathlib.Path, source: Source) -> str:
    pages, seen = [], set()
    for pattern in source.globs:
        for path in sorted(root.glob(pattern)):
            if path.is_symlink() or "genindex" in path.name:
                continue
            raw = path.read_bytes()
            if path.suffix == ".gz":
                raw = gzip.decompress(raw)
            lines = plain(raw, ".html" in path.name).split("\n")
            # Menus and headers repeat on every page; a long line seen before is one of them.
            fresh = [x for x in lines if not (x in seen and len(x) > 12)]
            seen.update(fresh)
            pages.append("\n".join(fresh))
    if not pages:
        raise SystemExit(
            f"{source.package}: no file matches {source.globs}; has the package changed?"
        )
    return "\n".join(pages) + "\n"


def read_document(root: pathlib.Path) -> str:
    """The pages of DOCUMENT without the lines that stand on every page, which are menus."""
    pages = [plain((root / page).read_bytes(), is_html=True).split("\n") for page in DOCUMENT.globs]
    menu = set.intersection(*map(set, pages))
    return "".join(line + "\n" for page in pages for line in page if line not in menu)


def units(text: str) -> list:
    """Cuts text into sentences and lines; each keeps its separator before it: space or line break.

    "".join(units(text)) == "\n" + text for a text without blank lines and double spaces.
    """
    result = []
    for line in text.strip("\n").split("\n"):
        separator = "\n"
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", line):
            while sentence:
                cut = len(sentence)
                if cut > LONGEST_UNIT:
                    cut = sentence.rfind(" ", 1, LONGEST_UNIT)
                    cut = cut if cut > 0 else len(sentence)
                result.append(separator + sentence[:cut])
                sentence, separator = sentence[cut + 1 :], " "
    return result


def fetch(package: str, folder: pathlib.Path) -> pathlib.Path:
    """Downloads and unpacks a Debian package under folder; returns the unpacked root."""
    root = folder / package
    if not root.exists():
        subprocess.run(["apt-get", "-qq", "download", package], cwd=folder, check=True)
        (deb,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", deb, root], check=True)
    return root


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".train/text"))
    parser.add_argument("--split", choices=tuple(SOURCES), action="append")
    parser.add_argument("--document", type=pathlib.Path, help="write document.txt here, only that")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.document:
            root = fetch(DOCUMENT.package, pathlib.Path(scratch))
            args.document.write_text(read_document(root), encoding="utf-8")
            return
        for split in args.split or SOURCES:
            target = args.out / split
            target.mkdir(parents=True, exist_ok=True)
            for source in SOURCES[split]:
                text = read_package(fetch(source.package, pathlib.Path(scratch)), source)
                (target / f"{source.package}.txt").write_text(text, encoding="utf-8")
                print(f"{split:8} {source.package:20} {len(text) / 1e6:6.2f} M characters")


if __name__ == "__main__":
    main()
