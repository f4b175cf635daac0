#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes docs/cli.md from the program's own help.

    tools/render_cli.py --binary build/release/infllm [--check]
"""

import argparse
import pathlib
import subprocess
import sys

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs/cli.md"
HEADER = """# The program

What `infllm --help` and `infllm COMMAND --help` print, rendered by `make render-cli`.
"""
COMMANDS = ["run", "chat", "bench", "inspect", "tokenize", "eval"]


def help_of(binary, command):
    arguments = [binary, *([command] if command else []), "--help"]
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.rstrip()


def render(binary):
    parts = [HEADER, f"```\n{help_of(binary, None)}\n```\n"]
    for command in COMMANDS:
        parts.append(f"## infllm {command}\n\n```\n{help_of(binary, command)}\n```\n")
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", required=True)
    parser.add_argument("--check", action="store_true", help="fail when the file would change")
    options = parser.parse_args()
    text = render(options.binary)
    if options.check:
        if not DOCUMENT.is_file() or DOCUMENT.read_text(encoding="utf-8") != text:
            print("docs/cli.md differs from the program's help; run `make render-cli`",
                  file=sys.stderr)
            return 1
        return 0
    DOCUMENT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
