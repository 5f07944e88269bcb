"""Plots as inline SVG: lines and bars, in the colours of the page that they stand in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import ceil, floor, log10

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 34, 44
COLOURS = 6  # of the page: --c0 to --c5

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line. `stepped`: a value holds until the next one."""

    name: str
    points: Points
    stepped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Title, labels, and the largest values (None: of the data)."""

    title: str
    x: str
    y: str
    y_most: float | None = None


def lines(axes: Axes, series: Sequence[Series]) -> str:
    """A chart of lines, its origin at 0. Series without points are left out."""
    shown = [one for one in series if one.points]
    if not shown:
        return ""
    x_most = max(max(x for x, _ in one.points) for one in shown) or 1.0
    y_most = axes.y_most or max(max(y for _, y in one.points) for one in shown) or 1.0
    parts = _frame(axes, x_most, y_most)
    for index, one in enumerate(shown):
        points = _steps(one.points) if one.stepped else one.points
        path = " ".join(f"{_x(x, x_most):.1f},{_y(min(y, y_most), y_most):.1f}" for x, y in points)
        colour = f"var(--c{index % COLOURS})"
        parts.append(f'<polyline points="{path}" style="fill:none;stroke:{colour}"/>')
        parts.append(_legend(index, one.name, colour))
    return _svg(axes.title, parts)


def bars(axes: Axes, values: Sequence[tuple[str, float]]) -> str:
    """A chart of bars, one a name; names are tooltips."""
    if not values:
        return ""
    y_most = max(value for _, value in values) or 1.0
    parts = _frame(axes, float(len(values)), y_most)
    width = (WIDTH - LEFT - RIGHT) / len(values)
    for index, (name, value) in enumerate(values):
        top = _y(value, y_most)
        parts.append(
            f'<rect x="{LEFT + index * width:.1f}" y="{top:.1f}" width="{max(width - 1, 0.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}" style="fill:var(--c0)">'
            f"<title>{escape(name)}: {value:,.0f}</title></rect>"
        )
    return _svg(axes.title, parts)


def _svg(title: str, parts: Sequence[str]) -> str:
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    return f"<svg {box}>{''.join(parts)}</svg>"


def _frame(axes: Axes, x_most: float, y_most: float) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(axes.title)}</text>']
    for value in _ticks(x_most):
        at = _x(value, x_most)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
        label = f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{value:,g}</text>'
        parts.append(label)
    for value in _ticks(y_most):
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


def _legend(index: int, name: str, colour: str) -> str:
    y = TOP + 14 + 15 * index
    x = WIDTH - RIGHT - 8
    return f'<text x="{x}" y="{y}" text-anchor="end" style="fill:{colour}">{escape(name)}</text>'


def _ticks(most: float) -> list[float]:
    """About four round values from 0 to the most."""
    size = 10 ** floor(log10(most / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if most / (size * factor) <= 5)
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
