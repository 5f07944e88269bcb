"""What an experiment says: rows of figures, and targets that are met or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fabric.sim.table import align


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One sentence, the figure found and whether it is good enough."""

    text: str
    found: str
    met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """`rows[0]` is the head of the table."""

    rows: tuple[tuple[str, ...], ...]
    targets: tuple[Target, ...]

    @property
    def met(self) -> bool:
        """All targets are."""
        return all(target.met for target in self.targets)

    def render(self) -> str:
        """For a terminal."""
        verdicts = [
            f"  {'met   ' if one.met else 'MISSED'}  {one.text}: {one.found}"
            for one in self.targets
        ]
        return "\n".join([align(self.rows), *verdicts])

    def record(self, name: str) -> dict[str, Any]:
        """JSON-able."""
        head, *rest = self.rows
        return {
            "scenario": name,
            "rows": [dict(zip(head, row, strict=True)) for row in rest],
            "targets": [
                {"text": one.text, "found": one.found, "met": one.met} for one in self.targets
            ],
        }


def over_seeds(results: Sequence[Result]) -> Result:
    """One experiment with several seeds: a target is met if each of them meets it."""
    first, *rest = results
    if not rest:
        return first
    rows = [first.rows[0]]
    for number, result in enumerate(results):
        rows += [(f"{number}: {name}", *cells) for name, *cells in result.rows[1:]]
    targets = [
        Target(
            text=same[0].text,
            found=", ".join(one.found for one in same),
            met=all(one.met for one in same),
        )
        for same in zip(first.targets, *(one.targets for one in rest), strict=True)
    ]
    return Result(rows=tuple(rows), targets=tuple(targets))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """`run(seed)` is a pure function of its seed. `slow`: it takes minutes."""

    name: str
    text: str
    run: Callable[[str], Result]
    slow: bool = False


def row(*cells: object) -> tuple[str, ...]:
    """A row of a table: numbers with three significant digits."""
    return tuple(f"{one:,.3g}" if isinstance(one, float) else str(one) for one in cells)


def head(words: str) -> tuple[str, ...]:
    """The first row, its columns separated by |."""
    return tuple(word.strip() for word in words.split("|"))


Rows = Sequence[tuple[str, ...]]
