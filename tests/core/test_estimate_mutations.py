"""The machines of what is foretold see the bugs that they are there for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis.stateful import RuleBasedStateMachine
from kit.forecast_machine import ForecastMachine
from kit.lengths_machine import LengthsMachine
from kit.planting import Mutation, constant, must_find

from fabric.core.control import forecast as forecast_module
from fabric.core.control.forecast import NS_PER_S, Forecaster
from fabric.core.request import Request
from fabric.core.traffic import lengths as lengths_module
from fabric.core.traffic.lengths import Lengths


def missed_is_held(original: Callable[..., Any]) -> Callable[..., Any]:
    """Every miss moves the level further down."""
    return lambda self, covered: original(self, not covered)


def next_one_up(original: Callable[..., Any]) -> Callable[..., Any]:
    """The level above."""
    return lambda self, level: original(self, min(1.0, level + 0.05))


def first_come_first_forgotten(_: Callable[..., Any]) -> Callable[..., Any]:
    """Who is used often is forgotten as soon as who is not."""

    def observe(self: Lengths, request: Request, tokens: int) -> None:
        for key in lengths_module._keys(request):
            node = self._nodes.setdefault(key, lengths_module._Node())
            if node.count >= lengths_module.ENOUGH:
                node.correct(tokens <= min(request.sampling.max_tokens, node.quantile(node.level)))
            node.add(tokens)
        while len(self._nodes) > lengths_module.MAX_NODES:
            del self._nodes[next(iter(self._nodes))]

    return observe


def beyond_the_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """More than `max_tokens` is expected."""

    def estimate(self: Lengths, request: Request) -> Any:
        more = replace(request.sampling, max_tokens=2 * request.sampling.max_tokens - 1)
        return original(self, replace(request, sampling=more))

    return estimate


def sums_never_fade(original: Callable[..., Any]) -> Callable[..., Any]:
    """Counts are halved, and the sum stays."""

    def add(self: Any, tokens: int) -> None:
        before = self._total
        original(self, tokens)
        self._total = before + tokens

    return add


def without_tenant(original: Callable[..., Any]) -> Callable[..., Any]:
    """All tenants are one."""
    return lambda request: original(replace(request, tenant=""))


def one_edge_lower(original: Callable[..., Any]) -> Callable[..., Any]:
    """The lower edge of a wide bucket."""
    return lambda bucket: original(bucket - 1 if bucket > lengths_module.EXACT else bucket)


LENGTHS: list[Mutation] = [
    (lengths_module._Node, "correct", constant(None)),
    (lengths_module._Node, "correct", missed_is_held),
    (lengths_module._Node, "quantile", next_one_up),
    (lengths_module._Node, "add", sums_never_fade),
    (Lengths, "observe", first_come_first_forgotten),
    (Lengths, "estimate", beyond_the_request),
    (lengths_module, "_keys", without_tenant),
    (lengths_module, "_edge", one_edge_lower),
]


def silence_is_nothing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Buckets in which nothing came are left out."""

    def advance(self: Forecaster, now: int) -> None:
        number = now // int(self.config.bucket_s * NS_PER_S)
        if self._bucket is not None and self._bucket < number and not self._bucket_work:
            self._bucket = number
        original(self, now)

    return advance


def counted_twice(original: Callable[..., Any]) -> Callable[..., Any]:
    """What was in hand when a bucket closed is in the next one too."""

    def advance(self: Forecaster, now: int) -> None:
        before, bucket = self._bucket_work, self._bucket
        original(self, now)
        if bucket is not None and self._bucket == bucket + 1:
            self._bucket_work = before

    return advance


def only_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """A clock that was set back is waited for."""
    return lambda self, now: original(
        self, max(now, (self._bucket or 0) * int(self.config.bucket_s * NS_PER_S))
    )


def for_ever(_: Callable[..., Any]) -> Callable[..., Any]:
    """A trend goes on undamped."""
    return lambda self, buckets: max(0.0, self.level + self.trend * buckets)


def the_slot_before(original: Callable[..., Any]) -> Callable[..., Any]:
    """A slot's rate is that of its neighbour."""
    return lambda self, slot, rate: original(self, (slot - 1) % self.slots, rate)


def in_steps(_: Callable[..., Any]) -> Callable[..., Any]:
    """A season changes from one slot to the next at once."""
    return lambda self, place: self.change[int(place) % self.slots]


def believed_at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """A season is one before a whole period was seen."""

    def see(self: Any, slot: int, rate: float) -> None:
        if self._first is not None and self._first:
            self._first = {one: self._first.get(one, 0.0) for one in range(self.slots - 1)}
        original(self, slot, rate)

    return see


FORECAST: list[Mutation] = [
    (Forecaster, "_advance", silence_is_nothing),
    (Forecaster, "_advance", counted_twice),
    (Forecaster, "_advance", only_forward),
    (Forecaster, "_place", constant(0.5)),
    (forecast_module._Holt, "at", for_ever),
    (forecast_module._Season, "see", constant(None)),
    (forecast_module._Season, "see", the_slot_before),
    (forecast_module._Season, "see", believed_at_once),
    (forecast_module._Season, "at", in_steps),
]

MUTATIONS = [
    pytest.param(machine, mutation, id=f"{mutation[0].__name__.split('.')[-1]}.{mutation[1]}-{at}")
    for machine, mutations in ((LengthsMachine, LENGTHS), (ForecastMachine, FORECAST))
    for at, mutation in enumerate(mutations)
]


@pytest.mark.parametrize(("machine", "mutation"), MUTATIONS)
def test_a_planted_bug_is_found(machine: type[RuleBasedStateMachine], mutation: Mutation) -> None:
    must_find(machine, mutation)
