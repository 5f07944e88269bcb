"""The bounds of sharing, as `fabric simulate` prints them, hold; several seeds are one verdict."""

from __future__ import annotations

import pytest
from kit.planting import constant, planted

from fabric.core.control.leases import LeaseSplit
from fabric.core.traffic.service import Service
from fabric.sim.scenarios import Result, Target, scenario
from fabric.sim.scenarios.result import over_seeds


@pytest.mark.parametrize("name", ["leases", "bounded-waits"])
def test_a_bound_holds(name: str) -> None:
    found = scenario(name).run("0")
    assert found.met, found.render()


def test_leases_that_give_everybody_everything_are_seen() -> None:
    whole = {f"d{index}": (240.0, 0.0, 6) for index in range(3)}
    with (
        planted(LeaseSplit, "_shares_of", constant(whole)),
        planted(LeaseSplit, "check", constant(None)),
    ):
        assert not scenario("leases").run("0").met


def test_a_tier_that_better_ones_leave_no_head_room_is_seen() -> None:
    with planted(Service, "is_passed_over", constant(False)):
        assert not scenario("bounded-waits").run("0").met


def test_several_seeds_are_met_if_each_is() -> None:
    def one(name: str, *, met: bool) -> Result:
        return Result(
            rows=(("what",), (name,)), targets=(Target(text="it holds", found=name, met=met),)
        )

    good, bad = one("good", met=True), one("bad", met=False)
    assert over_seeds([good, good]).met
    both = over_seeds([good, bad])
    assert both.targets == (Target(text="it holds", found="good, bad", met=False),)
    assert both.rows == (("what",), ("0: good",), ("1: bad",))
