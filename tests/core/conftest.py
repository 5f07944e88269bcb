"""What of tests/core runs nightly for its length alone."""

from __future__ import annotations

import pytest

# Searches for a planted bug that take a second or more; those for other bugs of the same machines
# run always.
LONG_SEARCHES = frozenset(
    {
        "Autoscaler._has_work-2",
        "Autoscaler._note_change-1",
        "BlockPool._lru_remove-0",
        "Group.note_prompt_logprobs-17",
        "Handovers._verdict-0",
        "Handovers.stand_back-2",
        "LeaseSplit._hear-2",
        "Ledger.observe-0",
        "Meter.has_place-7",
        "Ordered.add-8",
        "Meter.wait_s-6",
        "PrefixIndex.forget-6",
        "PrefixIndex.match-5",
        "Quarantine-_is_deadly-<lambda>",
        "Quarantine-died-any_of_them",
        "Router.forget-1",
        "Scheduler._admit_waiting-3",
        "Scheduler._age-11",
        "Scheduler._preempt_behind-2",
        "Sequence.may_preempt-10",
        "Station.has_room-0",
        "Station.see-1",
        "Station.send-2",
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name, _, rest = item.name.partition("[")
        if name == "test_a_planted_bug_is_found" and rest.removesuffix("]") in LONG_SEARCHES:
            item.add_marker(pytest.mark.nightly)
