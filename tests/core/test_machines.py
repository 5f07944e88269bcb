"""Every state machine of the core, driven through any order of its verbs against a naive model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from kit.engine_machine import EngineMachine
from kit.pool_machine import PoolMachine
from kit.traffic_machines import AdmissionMachine, RouterMachine

MACHINES = [
    (EngineMachine, settings(max_examples=100, stateful_step_count=30)),
    (PoolMachine, settings(max_examples=80, stateful_step_count=40)),
    (AdmissionMachine, settings(max_examples=60, stateful_step_count=30)),
    (RouterMachine, settings(max_examples=60, stateful_step_count=30)),
]


@pytest.mark.parametrize(("machine", "search"), MACHINES, ids=[m.__name__ for m, _ in MACHINES])
def test_machine(machine: type[RuleBasedStateMachine], search: settings) -> None:
    run_state_machine_as_test(machine, settings=search)
