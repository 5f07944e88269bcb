"""What is recorded comes again, from any beginning; what does not is named."""

from __future__ import annotations

import inspect
from functools import cache
from types import ModuleType

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from kit import (
    engine_machine,
    ladder_machine,
    lease_world,
    pool_model,
    router_machine,
    slo_machine,
    traffic_machines,
)
from kit.autoscaler_machine import AutoscalerMachine
from kit.engine_machine import EngineMachine
from kit.journalled import Memory, busy_engine, difference, replayed, watched
from kit.ladder_machine import LadderMachine
from kit.lease_world import LeaseWorld
from kit.planting import Wrong, constant, off_by, planted
from kit.router_machine import RouterMachine
from kit.slo_machine import LedgerMachine
from kit.traffic_machines import AdmissionMachine

from fabric.core.configs import AdmissionConfig
from fabric.core.control.autoscaler import Autoscaler
from fabric.core.control.degrade import Ladder
from fabric.core.control.leases import LeaseSplit
from fabric.core.control.slo import Ledger
from fabric.core.engine.budget import Budget
from fabric.core.engine.engine import Engine
from fabric.core.engine.scheduler import Scheduler
from fabric.core.freeze import Freezer
from fabric.core.journal import KINDS, Event, Recorder
from fabric.core.prefix import Hasher
from fabric.core.traffic.admission import Admission
from fabric.core.traffic.router import Router
from fabric.core.traffic.speed import Capacity
from fabric.core.traffic.station import Station

# (the kit's machine, the module that makes the core's, which)
ENGINE = (EngineMachine, engine_machine, Engine)
MACHINES = [
    ENGINE,
    (AdmissionMachine, traffic_machines, Admission),
    (RouterMachine, router_machine, Router),
    (LadderMachine, ladder_machine, Ladder),
    (LedgerMachine, slo_machine, Ledger),
    (AutoscalerMachine, pool_model, Autoscaler),
]
QUICK = settings(max_examples=10, stateful_step_count=20)
LONG = settings(max_examples=1000, stateful_step_count=50)
Machine = type[RuleBasedStateMachine]


@pytest.mark.parametrize(
    ("machine", "module", "kind", "hide"), [(*one, True) for one in MACHINES] + [(*ENGINE, False)]
)
def test_any_order_of_verbs_replays(
    machine: Machine, module: ModuleType, kind: type, hide: bool
) -> None:
    with watched(module, kind, hide=hide) as memories:
        run_state_machine_as_test(replayed(machine, memories, hide=hide), settings=QUICK)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("hide", [True, False], ids=["hashed", "raw"])
@pytest.mark.parametrize(("machine", "module", "kind"), MACHINES)
def test_any_order_of_verbs_replays_for_long(
    machine: Machine, module: ModuleType, kind: type, hide: bool
) -> None:
    with watched(module, kind, hide=hide) as memories:
        run_state_machine_as_test(replayed(machine, memories, hide=hide), settings=LONG)


@pytest.mark.parametrize("kind", [LeaseSplit, Admission])
def test_leases_over_three_dispatchers_replay(kind: type) -> None:
    homes = dict.fromkeys(("few", "slow", "light", "heavy"), (0, 1, 2))
    with watched(lease_world, kind, hide=True) as memories:
        LeaseWorld(5, homes, places=6).run(40, 20)
    assert memories and all(len(memory.entries) > 5 for memory in memories)
    assert [difference(memory, hide=True) for memory in memories] == [None] * len(memories)


# A rule that was changed after a recording, and a machine that shows it.
CHANGES: list[tuple[type, str, Wrong, Machine]] = [
    (Scheduler, "_swap_is_cheaper", constant(False), EngineMachine),
    (Scheduler, "_shortage", off_by(1), EngineMachine),
    (Budget, "grant", off_by(-1), EngineMachine),
    (Admission, "retry_after_s", off_by(1), AdmissionMachine),
    (Station, "has_room", constant(True), RouterMachine),
]


@cache
def recorded(machine: Machine) -> list[Memory]:
    """What it decided by the rules as they are, which a replay confirms."""
    memories = decided(machine)
    assert not any(difference(memory, hide=True) for memory in memories)
    return memories


def decided(machine: Machine) -> list[Memory]:
    """Of an engine, or of a few examples."""
    if machine is EngineMachine:
        memory = Memory()
        busy_engine(Recorder(memory), 120)
        return [memory]
    module, kind = next((module, kind) for one, module, kind in MACHINES if one is machine)
    with watched(module, kind, hide=True) as memories:
        examples = 60 if machine is AdmissionMachine else QUICK.max_examples  # it has many verbs
        longer = settings(QUICK, derandomize=True, max_examples=examples)
        run_state_machine_as_test(machine, settings=longer)
    return memories


@pytest.mark.parametrize(("owner", "method", "change", "machine"), CHANGES)
def test_a_changed_rule_is_named(owner: type, method: str, change: Wrong, machine: Machine) -> None:
    memories = recorded(machine)
    with planted(owner, method, change):
        found = [one for memory in memories if (one := difference(memory, hide=True))]
    assert found, "a changed rule changed no decision"
    verbs = next(KINDS[kind].verbs for one, _, kind in MACHINES if one is machine)
    assert all(one.verb in (*verbs, "state") for one in found)
    assert all(one.recorded != one.replayed for one in found)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_public_name_of_a_machine_is_known(kind: type) -> None:
    """A new verb must be recorded, or a replay loses it."""
    known = KINDS[kind]
    public = {name for name in vars(kind) if not name.startswith("_")}
    slots = set(getattr(kind, "__slots__", ()))
    assert public - slots == {*known.verbs, *known.looks}


def test_a_part_that_is_no_state_is_refused() -> None:
    class Stranger:
        pass

    with pytest.raises(ValueError, match="is no state"):
        Freezer(hide=False).freeze([Stranger()])
    with pytest.raises(ValueError, match="can't be watched"):
        Recorder(Memory(), hide=True).watch("x", Hasher())


def test_what_is_set_is_recorded_or_refused() -> None:
    memory = Memory()
    admission = Recorder(memory).watch("admission", Admission(AdmissionConfig()))
    admission.capacity = Capacity()
    last = memory.entries[-1]
    assert isinstance(last, Event) and last.verb == "=capacity"
    with pytest.raises(ValueError, match="nothing that a journal"):
        admission.lengths = None  # type: ignore[assignment]
    assert inspect.ismethod(admission.check), "looks are the machine's own"
