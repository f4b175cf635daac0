# SPDX-License-Identifier: Apache-2.0
"""Real text for training: documentation packages of Debian 12, one compressed file a package.

    python3 examples/adapt/text.py --out .train/adapt/text

downloads with `apt-get download`, unpacks with `dpkg -x` (nothing is installed), strips markup and
writes {train,heldout}/PACKAGE.txt.xz. Nothing of it is part of this repository. examples/needle
reads packages the same way; corpus.py there is used for it.
"""

import argparse
import gzip
import lzma
import pathlib
import re
import tempfile
from typing import NamedTuple

from needle import corpus

SKIP = re.compile(r"genindex|py-modindex|/_modules/|/_sources/|/src/|core/arch|core_arch")


class Source(NamedTuple):
    package: str
    licence: str  # of the documentation, from the package's copyright file
    globs: tuple = ("usr/share/doc/**/*.html",)


SOURCES = {
    "train": (
        *(Source(*source) for source in corpus.SOURCES["train"]),
        Source("linux-doc-6.1", "GPL-2.0", ("usr/share/doc/linux-doc-6.1/html/**/*.html",)),
        Source("rust-doc", "MIT or Apache-2.0", ("usr/share/doc/rust-doc/html/**/*.html",)),
        Source("erlang-doc", "Apache-2.0"),
        Source("nodejs-doc", "MIT"),
        Source("nova-doc", "Apache-2.0"),
        Source("neutron-doc", "Apache-2.0"),
        Source("cinder-doc", "Apache-2.0"),
        Source("keystone-doc", "Apache-2.0"),
        Source("ironic-doc", "Apache-2.0"),
        Source("python-django-doc", "BSD-3-Clause"),
        Source("python-sqlalchemy-doc", "MIT"),
        Source("python-pandas-doc", "BSD-3-Clause"),
        Source("python-scipy-doc", "BSD-3-Clause"),
        Source("python-sympy-doc", "BSD-3-Clause"),
        Source("python-sklearn-doc", "BSD-3-Clause"),
        Source("python-astropy-doc", "BSD-3-Clause"),
        Source("libboost1.81-doc", "BSL-1.0"),
        Source("libreoffice-help-en-us", "MPL-2.0", ("usr/share/libreoffice/help/en-US/**/*.html",)),
        Source("ghc-doc", "BSD-3-Clause", ("usr/share/doc/ghc-doc/html/**/*.html",)),
        Source("racket-doc", "MIT or Apache-2.0"),
        Source("swi-prolog-doc", "BSD-2-Clause", ("usr/share/swi-prolog/doc/**/*.html",)),
    ),
    "heldout": tuple(
        Source(s.package, s.licence, s.globs) for s in corpus.SOURCES["heldout"]
    ),
}


def read_package(root: pathlib.Path, source: Source) -> str:
    """All pages of an unpacked package, in the order of their paths, menus said once."""
    pages, seen = [], set()
    for path in sorted({p for pattern in source.globs for p in root.glob(pattern)}):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() or not path.is_file() or SKIP.search("/" + name):
            continue
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        lines = corpus.plain(raw, ".html" in path.name).split("\n")
        # Menus, headers and generated phrases repeat on many pages; seen once is enough.
        fresh = [line for line in lines if not (line in seen and len(line) > 12)]
        seen.update(fresh)
        pages.append("\n".join(fresh))
    if not pages:
        raise SystemExit(f"{source.package}: no file matches {source.globs}; has it changed?")
    return "\n".join(pages) + "\n"


def load(folder: pathlib.Path, split: str) -> list:
    """[(package, text)] of one split."""
    return [
        (path.name.removesuffix(".txt.xz"), lzma.decompress(path.read_bytes()).decode("utf-8"))
        for path in sorted((folder / split).glob("*.txt.xz"))
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(".train/adapt/text"))
    parser.add_argument("--packages", type=pathlib.Path, help="keep unpacked packages here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packages = args.packages or pathlib.Path(scratch)
        for split, sources in SOURCES.items():
            (args.out / split).mkdir(parents=True, exist_ok=True)
            for source in sources:
                target = args.out / split / f"{source.package}.txt.xz"
                if not target.exists():
                    text = read_package(corpus.fetch(source.package, packages), source).encode()
                    target.write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
                    size, small = len(text) / 1e6, target.stat().st_size / 1e6
                    print(f"{split:8} {source.package:24} {size:7.2f} MB, xz {small:6.2f}", flush=True)


if __name__ == "__main__":
    main()
