# SPDX-License-Identifier: Apache-2.0
"""The part of a page that a program writes, between two lines of marks."""


def marks(name, writer):
    """The line in front and the line behind."""
    return f"<!-- begin:{name} ({writer} writes what follows) -->", f"<!-- end:{name} -->"


def rendered(page, name, writer, body, so_far=None):
    """{page: its text with what body() returns between the marks}, or nothing where there is no page.
    so_far: {page: text} of what was rendered before, as a page may have several such parts."""
    if not page.is_file():
        return {}
    begin, end = marks(name, writer)
    text = (so_far or {}).get(page) or page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page.name}: expected one line {begin} and one line {end}")
    before, rest = text.split(begin)
    return {page: f"{before}{begin}\n{body()}{end}{rest.split(end)[1]}"}
