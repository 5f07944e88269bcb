"""Every state machine of the core, driven through any order of its verbs against a naive model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from kit.autoscaler_machine import AutoscalerMachine
from kit.engine_machine import EngineMachine
from kit.forecast_machine import ForecastMachine
from kit.handoff_machine import HandoffMachine
from kit.handover_machine import HandoverMachine
from kit.journey_machine import JourneyMachine
from kit.ladder_machine import LadderMachine
from kit.lengths_machine import LengthsMachine
from kit.loan_machine import LoanMachine
from kit.pairing_machine import PairingMachine
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
    PairingMachine,
    JourneyMachine,
    LadderMachine,
    LedgerMachine,
    LoanMachine,
    AutoscalerMachine,
    LengthsMachine,
    ForecastMachine,
)
Machine = type[RuleBasedStateMachine]


@pytest.mark.parametrize("machine", MACHINES)
def test_machine(machine: Machine) -> None:
    """A few examples: that they are enough to see a bug is what planted ones show."""
    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=30))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", MACHINES)
def test_machine_for_long(machine: Machine) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=3000, stateful_step_count=60))
