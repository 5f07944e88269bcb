"""Every state machine of the core, driven through any order of its verbs against a naive model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from kit.autoscaler_machine import AutoscalerMachine
from kit.engine_machine import EngineMachine
from kit.handoff_machine import HandoffMachine
from kit.handover_machine import HandoverMachine
from kit.journey_machine import JourneyMachine
from kit.ladder_machine import LadderMachine
from kit.pool_machine import PoolMachine
from kit.router_machine import RouterMachine
from kit.slo_machine import LedgerMachine
from kit.traffic_machines import AdmissionMachine, FairMachine

MACHINES = (
    EngineMachine,
    HandoverMachine,
    HandoffMachine,
    PoolMachine,
    AdmissionMachine,
    FairMachine,
    RouterMachine,
    JourneyMachine,
    LadderMachine,
    LedgerMachine,
    AutoscalerMachine,
)
Machine = type[RuleBasedStateMachine]


@pytest.mark.parametrize("machine", MACHINES)
def test_machine(machine: Machine) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=50, stateful_step_count=30))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", MACHINES)
def test_machine_for_long(machine: Machine) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=3000, stateful_step_count=60))
