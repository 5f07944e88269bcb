"""Random numbers that are a function of (seed, how many were drawn): the same in every replay."""

from __future__ import annotations

MASK = (1 << 64) - 1


class CounterRandom:
    """SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = seed & MASK

    def below(self, bound: int) -> int:
        """A number in [0, bound). The bias of the remainder is bound / 2^64."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return (z ^ (z >> 31)) % bound

    def sample(self, count: int, bound: int) -> list[int]:
        """`count` different numbers in [0, bound), in the order drawn (Floyd's method)."""
        chosen: dict[int, None] = {}
        for top in range(bound - count, bound):
            drawn = self.below(top + 1)
            chosen[top if drawn in chosen else drawn] = None
        return list(chosen)
