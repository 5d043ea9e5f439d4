"""Lines over two logarithmic axes as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 48
_COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df")


def line_chart(title: str, x: str, y: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """The text of an SVG file.

    Args:
        x, y: what the axes say. x has a mark at each power of two, y at 1, 2 and 5 times the powers of ten.
        lines: name -> points, all above zero; at least two different values on each axis.
    """
    xs, ys = ([point[axis] for points in lines.values() for point in points] for axis in (0, 1))
    if not xs or min(*xs, *ys) <= 0:
        raise ValueError("lines: must have points, all above zero, for logarithmic axes")
    across = _Axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    up = _Axis(min(ys), max(ys), HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        '     font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x)}</text>',
        f'<text transform="translate(14 {HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y)}</text>',
    ]
    for value in across.marks((1,), 2):
        at = across.place(value)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_short(value)}</text>')
    for value in up.marks((1, 2, 5), 10):
        at = up.place(value)
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#d0d7de"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for index, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{across.place(a):.1f},{up.place(b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{_LEFT + 12}" y="{_TOP + 18 + 16 * index}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        if not low < high:
            raise ValueError(f"lines: all points are at {low}, an axis needs two different values")
        self._low, self._high, self._start, self._stop = low, high, start, stop

    def place(self, value: float) -> float:
        part = math.log(value / self._low) / math.log(self._high / self._low)
        return self._start + part * (self._stop - self._start)

    def marks(self, steps: Sequence[float], base: int) -> list[float]:
        """Steps times powers of the base that lie on the axis."""
        powers = range(math.floor(math.log(self._low, base)) - 1, math.ceil(math.log(self._high, base)) + 1)
        found = [step * float(base) ** power for power in powers for step in steps]
        return [value for value in found if self._low * (1 - 1e-9) <= value <= self._high * (1 + 1e-9)]


def _short(value: float) -> str:
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
