# SPDX-License-Identifier: Apache-2.0
"""A line chart on two logarithmic axes as an SVG text, without any library."""

import math

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 40, 48
COLOURS = ["#b5442e", "#1f6f8b", "#7a6a1f", "#5b3f8c"]


def escape(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def tokens_label(tokens):
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def milliseconds_label(value):
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"


def scale(low, high, start, end):
    """The map from [low, high] in logarithms to [start, end]; one value only maps to the start."""
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(value / low) / span


def line_chart(title, lines):
    """lines: {label: [(tokens, milliseconds), ...]}, each drawn through its points."""
    points = [point for line in lines.values() for point in line]
    tokens = sorted({x for x, _ in points})
    low = 10 ** math.floor(math.log10(min(y for _, y in points)))
    high = 10 ** math.ceil(math.log10(max(y for _, y in points)))
    x = scale(tokens[0], tokens[-1], LEFT, WIDTH - RIGHT)
    y = scale(low, max(high, 10 * low), HEIGHT - BOTTOM, TOP)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           'font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>']
    for exponent in range(round(math.log10(low)), round(math.log10(max(high, 10 * low))) + 1):
        height = y(10.0 ** exponent)
        out.append(f'<path d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">'
                   f'{milliseconds_label(10.0 ** exponent)}</text>')
    for value in tokens:
        out.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                   f'{tokens_label(value)}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" '
               'text-anchor="middle">tokens</text>')
    for colour, (label, line) in zip(COLOURS, lines.items()):
        line = sorted(line)
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{colour}"/>' for a, b in line]
        out.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y(line[-1][1]) + 4:.1f}" fill="{colour}">'
                   f'{escape(label)}, {milliseconds_label(float(f"{line[-1][1]:.3g}"))}</text>')
    return "\n".join(out + ["</svg>", ""])
