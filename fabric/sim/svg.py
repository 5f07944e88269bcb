"""Plots as inline SVG: lines and bars, in the colours of the page that they stand in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil, floor, log10

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 78, 12, 46, 44
COLOURS = 6  # of the page: --c0 to --c5
LETTER = 6.3  # about as wide is a letter
LONGEST_NAME = 30
WIDEST_BAR = 60

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line. `stepped`: a value holds until the next one."""

    name: str
    points: Points
    stepped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Title, labels, and the largest values (None: of the data). `counts`: no part of one is."""

    title: str
    x: str
    y: str
    y_most: float | None = None
    counts: bool = False


def lines(axes: Axes, series: Sequence[Series]) -> str:
    """A chart of lines, its origin at 0. Series that are 0 all along are left out beside others."""
    some = [one for one in series if any(y for _, y in one.points)]
    shown = some or [one for one in series if one.points][:1]
    if not shown:
        return ""
    x_most = max(max(x for x, _ in one.points) for one in shown) or 1.0
    y_most = axes.y_most or max(max(y for _, y in one.points) for one in shown) or 1.0
    parts = _frame(axes, y_most)
    parts += _across(x_most)
    at = LEFT
    for index, one in enumerate(shown):
        points = _steps(one.points) if one.stepped else one.points
        path = " ".join(f"{_x(x, x_most):.1f},{_y(min(y, y_most), y_most):.1f}" for x, y in points)
        colour = f"var(--c{index % COLOURS})"
        parts.append(f'<polyline points="{path}" style="fill:none;stroke:{colour}"/>')
        name = one.name if len(one.name) <= LONGEST_NAME else f"…{one.name[1 - LONGEST_NAME :]}"
        parts.append(f'<text x="{at}" y="32" style="fill:{colour}">{escape(name)}</text>')
        at += round(LETTER * len(name)) + 14
    return _svg(axes.title, parts)


def bars(axes: Axes, values: Sequence[tuple[str, float]]) -> str:
    """A chart of bars, one a name; names are tooltips, and labels where there is room."""
    if not values:
        return ""
    y_most = max(value for _, value in values) or 1.0
    parts = _frame(axes, y_most)
    width = min((WIDTH - LEFT - RIGHT) / len(values), WIDEST_BAR)
    for index, (name, value) in enumerate(values):
        top, left = _y(value, y_most), LEFT + index * width
        if LETTER * len(name) < width:
            middle = left + width / 2
            place = f'x="{middle:.1f}" y="{HEIGHT - BOTTOM + 16}"'
            parts.append(f'<text {place} text-anchor="middle">{escape(name)}</text>')
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(width - 1, 0.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}" style="fill:var(--c0)">'
            f"<title>{escape(name)}: {value:,.0f}</title></rect>"
        )
    return _svg(axes.title, parts)


def _svg(title: str, parts: Sequence[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    return f"<svg {box}>{''.join(parts)}</svg>"


def _across(x_most: float) -> list[str]:
    """What stands below the plot, and the lines up from there."""
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in _ticks(x_most):
        at = _x(value, x_most)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
        label = f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{value:,g}</text>'
        parts.append(label)
    return parts


def _frame(axes: Axes, y_most: float) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(axes.title)}</text>']
    for value in _ticks(y_most, whole=axes.counts):
        at = _y(value, y_most)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        label = f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:,g}</text>'
        parts.append(label)
    middle = (LEFT + right) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(axes.x)}</text>'
    )
    parts.append(
        f'<text transform="translate(12 {(TOP + bottom) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(axes.y)}</text>'
    )
    return parts


def _ticks(most: float, *, whole: bool = False) -> list[float]:
    """About four round values from 0 to the most."""
    size = 10 ** floor(log10(most / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if most / (size * factor) <= 5)
    step = max(step, 1.0) if whole else step
    return [round(step * index, 10) for index in range(ceil(most / step) + 1) if
            step * index <= most * 1.0001]  # fmt: skip


def _steps(points: Points) -> list[tuple[float, float]]:
    found = [points[0]]
    for (_, before), (x, y) in pairwise(points):
        found += [(x, before), (x, y)]
    return found


def _x(value: float, most: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * value / most


def _y(value: float, most: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / most
