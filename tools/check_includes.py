#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Holds the sources to the arrows of docs/architecture.md.

    core <- ops <- backend <- app, tests, bench
             ^
             +---- model <- engine <- app, tests, bench, fuzz

    tools/check_includes.py [ROOT]

Fails on an include against an arrow, on an outside library seen where it should not be, on an
include path that is not written from the repository's root, and on a source without its licence
line. Files longer than their guide figure are reported, without failing: look for the second
concept in them.
"""

import pathlib
import re
import sys

# What the CUDA columns' folders share.
CUDA_SHARED = ["infllm/backend/cuda/" + name for name in (
    "tile", "device.h", "heads.h", "launch.cuh", "numbers.cuh", "page.cuh", "pooled.h", "powers.cuh",
    "shapes.cuh")]

# Who may include whom. The longest matching folder on the left decides.
ARROWS = {
    "infllm/core": ["infllm/core"],
    "infllm/ops": ["infllm/ops", "infllm/core"],
    "infllm/backend": ["infllm/backend", "infllm/ops", "infllm/core"],
    "infllm/backend/reference": [
        "infllm/backend/reference", "infllm/backend/host_memory.h", "infllm/ops", "infllm/core"],
    "infllm/backend/cpu": [
        "infllm/backend/cpu", "infllm/backend/host_memory.h", "infllm/ops", "infllm/core"],
    "infllm/backend/cuda": ["infllm/backend/cuda", "infllm/ops", "infllm/core"],
    # The tuned column may inherit launch declarations of the general one, never the reverse.
    "infllm/backend/cuda/tile": [
        "infllm/backend/cuda/tile", "infllm/core/dtype.h", "infllm/core/status.h"],
    "infllm/backend/cuda/sm80": [
        "infllm/backend/cuda/sm80", *CUDA_SHARED, "infllm/ops", "infllm/core"],
    "infllm/backend/cuda/decode": [
        "infllm/backend/cuda/decode", *CUDA_SHARED, "infllm/ops", "infllm/core"],
    "infllm/backend/cuda/sm90": [
        "infllm/backend/cuda/sm90", "infllm/backend/cuda/sm80", "infllm/backend/cuda/backward",
        *CUDA_SHARED, "infllm/ops", "infllm/core"],
    "infllm/model": ["infllm/model", "infllm/ops", "infllm/core"],
    "infllm/engine": ["infllm/engine", "infllm/model", "infllm/ops", "infllm/core"],
    "infllm/app": ["infllm"],
    "tests": ["infllm", "tests"],
    "bench": ["infllm", "bench"],
    "python": ["infllm/backend", "infllm/ops", "infllm/core", "python"],
    "fuzz": ["infllm/engine", "infllm/model", "infllm/core", "fuzz"],
}

# An outside library and the folders that may see it.
OUTSIDE = {
    "nlohmann/json_fwd.hpp": ["infllm", "tests", "bench", "fuzz"],
    "nlohmann/": ["infllm/core", "infllm/model", "infllm/engine", "infllm/app", "tests", "bench",
                  "fuzz"],
    "fmt/": ["infllm", "tests", "bench", "fuzz", "python"],
    "nanobind/": ["python"],
    "CLI/": ["infllm/app", "bench"],
    "boost/": ["infllm/app"],
    "hwy/": ["infllm/backend/cpu"],
    "cublas": ["infllm/backend/cuda"],
    "cuda": ["infllm/backend/cuda", "tests", "bench"],
    "gtest/": ["tests"],
    "gmock/": ["tests"],
    "rapidcheck": ["tests"],
}
# Seconds of compile time each: a header of ours may include one for the sources that need it, but
# no further header may include that one.
HEAVY = ("nlohmann/json.hpp", "CLI/", "boost/")

CODE = {".h", ".cc", ".cu", ".cuh"}
HEADERS = {".h", ".cuh"}
SCRIPTS = {".py", ".sh", ".cmake"}
FOLDERS = ["infllm", "tests", "bench", "fuzz", "tools", "examples", "python", "cmake"]
ROOT_FILES = ["CMakeLists.txt", "Makefile", ".ci/run"]
SKIP = {"__pycache__", "build", ".venv", "corpus", "golden"}

LICENCE = "SPDX-License-Identifier: Apache-2.0"
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)')


def is_below(path, folder):
    return path == folder or path.startswith(folder + "/")


def allowed_by(path):
    """The entry of ARROWS for a file, or None where no arrow is drawn (scripts, examples)."""
    folders = [folder for folder in ARROWS if is_below(path, folder)]
    return ARROWS[max(folders, key=len)] if folders else None


def is_header(path):
    # column-inl.h and its like are sources that several units share.
    return pathlib.Path(path).suffix in HEADERS and not path.endswith("-inl.h")


def check_own(root, path, target, heavy):
    if not (root / target).is_file():
        return f'includes "{target}", which is no file from the repository\'s root'
    allowed = allowed_by(path)
    if allowed is not None and not any(is_below(target, folder) for folder in allowed):
        return f'includes "{target}" against the arrows; it may see {", ".join(allowed)}'
    if target in heavy and is_header(path):
        return (f'includes "{target}", which brings <{heavy[target]}>, in a header; move it to the '
                ".cc, or the heavy part out of it")
    return None


def check_outside(path, target):
    names = [name for name in OUTSIDE if target.startswith(name)]
    if not names:
        return None
    folders = OUTSIDE[max(names, key=len)]
    if not any(is_below(path, folder) for folder in folders):
        return f'includes <{target}>, which only {", ".join(folders)} may see'
    return None


def includes(text):
    """(line number, own path or None, outside path or None) of every include."""
    for number, line in enumerate(text.splitlines(), 1):
        match = INCLUDE.match(line)
        if match:
            yield number, *match.groups()


def heavy_headers(texts):
    """{header of ours: the heavy library that it includes}"""
    return {path: outside for path, text in texts.items() if is_header(path)
            for _, _, outside in includes(text) if outside and outside.startswith(HEAVY)}


def check_file(root, path, text, heavy):
    """The violations of one file, as (line number, message)."""
    lines = text.splitlines()
    if not any(LICENCE in line for line in lines[:3]):
        yield 1, f"does not begin with the line {LICENCE}"
    if pathlib.Path(path).suffix not in CODE:
        return
    for number, own, outside in includes(text):
        message = check_own(root, path, own, heavy) if own else check_outside(path, outside)
        if message:
            yield number, message


def guide_length(path):
    if is_header(path):
        return 200
    return 600 if is_below(path, "infllm/backend") else 400


def source_files(root):
    for name in ROOT_FILES:
        if (root / name).is_file():
            yield name
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*")):
            relative = file.relative_to(root)
            if SKIP.intersection(relative.parts) or not file.is_file():
                continue
            if file.suffix in CODE | SCRIPTS or file.name == "CMakeLists.txt":
                yield relative.as_posix()


def check_tree(root):
    """(violations, long files), each a list of lines to print."""
    violations, long_files = [], []
    texts = {path: (root / path).read_text(encoding="utf-8") for path in source_files(root)}
    heavy = heavy_headers(texts)
    for path, text in texts.items():
        violations += [f"{path}:{line}: {message}"
                       for line, message in check_file(root, path, text, heavy)]
        length = text.count("\n")
        if length > guide_length(path):
            long_files.append(f"{path}: {length} lines, guide figure {guide_length(path)}")
    return violations, long_files


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[1])
    violations, long_files = check_tree(root)
    for line in long_files:
        print(f"note: {line}")
    for line in violations:
        print(f"error: {line}", file=sys.stderr)
    print(f"check_includes: {len(violations)} violations, {len(long_files)} long files")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
