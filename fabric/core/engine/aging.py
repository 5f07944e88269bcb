"""Nobody starves: whoever stood still for too long goes first."""

from __future__ import annotations

from collections.abc import Iterable

from fabric.core.engine.sequence import Sequence

# Before every class that a request can ask for.
AGED = (-(1 << 62), 0)


class Aging:
    """Nobody starves: who stood still for `patience_ns` becomes the first of all, one at a time.

    The first of all takes part in every step, so it ends. At most one sequence ages in
    `patience_ns` and it keeps its class to its end: what that costs better classes is bounded too.
    A sequence with k others that stood still for longer is let in after at most k + 1 times
    (9/8 of the patience + the time that one sequence takes as the first of all).
    """

    def __init__(self, patience_ns: int) -> None:
        self._patience_ns = patience_ns
        self.next_look: int | None = None  # ns
        self._aged: Sequence | None = None
        self._aged_at: int | None = None

    def find(self, sequences: Iterable[Sequence], now: int) -> Sequence | None:
        """The one to age now, if there is one. Looks only every eighth of the patience."""
        if self.next_look is not None and now < self.next_look:
            return None
        self.next_look = now + self._patience_ns // 8
        if self._aged is not None and self._aged.finish is not None:
            self._aged = None
        longest: Sequence | None = None
        for sequence in sequences:
            if sequence.stood_at != sequence.computed or sequence.stood_since is None:
                sequence.stood_at, sequence.stood_since = sequence.computed, now
            elif longest is None or _before(sequence, longest):
                longest = sequence
        if longest is None or self._aged is not None or longest.stood_since is None:
            return None
        if now - longest.stood_since < self._patience_ns:
            return None
        if self._aged_at is not None and now - self._aged_at < self._patience_ns:
            return None
        self._aged, self._aged_at = longest, now
        return longest


def _before(one: Sequence, other: Sequence) -> bool:
    """It has stood still for longer; of two, the more important one."""
    assert one.stood_since is not None and other.stood_since is not None
    return (one.stood_since, one.key) < (other.stood_since, other.key)
