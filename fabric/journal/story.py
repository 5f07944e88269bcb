"""What happened to one request, told by whoever looks on while a journal is played.

A story is a list of `Line`s. What lasts (a wait, and its reason) is one line with its end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NS_PER_S = 1_000_000_000


@dataclass(slots=True, kw_only=True)
class Line:
    """From `at` (ns) on; `until` None: it was a moment. `waits`: of what kind the wait was, for the
    sum; empty: none. `times`: how often it was looked at."""

    at: int
    text: str
    until: int | None = None
    waits: str = ""
    times: int = 1


@dataclass(slots=True, kw_only=True)
class Story:
    """`where`: which process tells it."""

    where: str
    lines: list[Line] = field(default_factory=list)
    _open: Line | None = None

    def tell(self, at: int, text: str) -> None:
        """A moment; it ends whatever lasted."""
        self.end(at)
        self.lines.append(Line(at=at, text=text))

    def lasts(self, at: int, waits: str, text: str) -> None:
        """It waits, and this is why; the same reason again only makes it longer."""
        if self._open is not None and self._open.waits == waits:
            self._open.until, self._open.text = at, text
            self._open.times += 1
            return
        self.end(at)
        self._open = Line(at=at, until=at, waits=waits, text=text)
        self.lines.append(self._open)

    def end(self, at: int) -> None:
        """What lasted is over."""
        if self._open is not None:
            self._open.until = at
            self._open = None


def render(stories: list[Story]) -> str:
    """A timeline of all, seconds from the beginning, and the sum of all waits."""
    lines = sorted(
        ((line.at, number, line, story.where) for number, story in enumerate(stories)
         for line in story.lines),
        key=lambda one: one[:2],
    )  # fmt: skip
    if not lines:
        return ""
    first = lines[0][0]
    width = max(len(where) for *_, where in lines)
    text = []
    waited: dict[str, int] = {}
    for at, _, line, where in lines:
        lasted = ""
        if line.until is not None:
            lasted = f" ({(line.until - at) / NS_PER_S:.3f} s)"
            waited[line.waits] = waited.get(line.waits, 0) + line.until - at
        text.append(f"{(at - first) / NS_PER_S:+10.3f} s  {where:{width}}  {line.text}{lasted}")
    sums = [
        f"{ns / NS_PER_S:.3f} s {reason}"
        for reason, ns in sorted(waited.items(), key=lambda one: -one[1])
        if ns
    ]
    text.append("")
    text.append(f"It waited {', '.join(sums)}." if sums else "It waited for nothing.")
    return "\n".join(text)
