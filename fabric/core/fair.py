"""Fair shares: virtual token counters (Sheng et al., "Fairness in serving large language models",
OSDI 2024), weighted.

A counter is the service that a name has had, over its weight; the backlogged name with the lowest
counter is next. Who comes back after a pause is lifted to the lowest counter of those who stayed:
nobody saves up service for later.

The bound. Let U be the largest charge. While names are backlogged their counters lie within U/w of
the lowest: only the lowest is ever charged, so it ends at most U/w above what was the lowest, and
lifting keeps everybody at or above it. So for f and g backlogged all through any interval,

    | service(f)/w(f) - service(g)/w(g) |  <=  U/w(f) + U/w(g)

and no name is further behind its weighted share than that. Corrections (what was charged at first
was an estimate) count as charges: U grows by the sum of those outstanding.
"""

from __future__ import annotations

from collections.abc import Mapping


class FairShare:
    """Counters of names. Everything is O(names): tenants of one tier, or tiers."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        if any(weight <= 0 for weight in weights.values()):
            raise ValueError("a weight must be above 0")
        self._weights = dict(weights)
        self._places = {name: place for place, name in enumerate(weights)}
        self._counters: dict[str, float] = {}
        self._active: dict[str, None] = {}
        self._floor = 0.0  # never falls

    def weight(self, name: str) -> float:
        """1 for a name that no weight was given for."""
        return self._weights.get(name, 1.0)

    def counter(self, name: str) -> float:
        """The service that the name counts as having had, over its weight."""
        return self._counters.get(name, self._floor)

    def enter(self, name: str) -> None:
        """The name is backlogged from now on."""
        if name in self._active:
            return
        self._raise_floor()
        self._counters[name] = max(self._counters.get(name, 0.0), self._floor)
        self._active[name] = None

    def leave(self, name: str) -> None:
        """It is not, any more."""
        if name not in self._active:
            return
        del self._active[name]
        if not self._active:  # whoever comes first finds the world as the last one left it
            self._floor = max(self._floor, self._counters[name])
        self._forget_idle()

    def charge(self, name: str, cost: float) -> None:
        """It got service (or, below 0, less than it was charged for)."""
        self._counters[name] = max(0.0, self.counter(name) + cost / self.weight(name))

    def adopt(self, name: str, counter: float) -> None:
        """The counter as the control plane has it, over all dispatchers."""
        self._counters[name] = counter

    def order(self) -> list[str]:
        """The backlogged names, who is furthest behind first; ties: as the weights were given."""
        last = len(self._places)
        return sorted(self._active, key=lambda n: (self.counter(n), self._places.get(n, last)))

    @property
    def active(self) -> bool:
        """Is anybody backlogged?"""
        return bool(self._active)

    def share(self, name: str) -> float:
        """Its part of what the backlogged get, if it is one of them from now on."""
        others = sum(self.weight(other) for other in self._active if other != name)
        own = self.weight(name)
        return own / (own + others)

    def check(self) -> None:
        """Whoever is backlogged has a counter, and none is negative."""
        assert all(name in self._counters for name in self._active), "no counter"
        assert all(counter >= 0 for counter in self._counters.values()), "below 0"

    def _raise_floor(self) -> None:
        if self._active:
            self._floor = max(self._floor, min(self.counter(name) for name in self._active))

    def _forget_idle(self) -> None:
        """An idle name at or below the floor would be lifted to it anyway."""
        self._raise_floor()
        gone = [
            name
            for name, counter in self._counters.items()
            if name not in self._active and counter <= self._floor
        ]
        for name in gone:
            del self._counters[name]
