"""For every test folder: how hypothesis searches."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# No deadline: a busy machine is no bug. In CI every run tries the same examples, so that a red run
# is about the change; at a desk every run tries new ones, and failures are kept in .hypothesis.
# At night there is time for many.
settings.register_profile(
    "desk", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("desk"), derandomize=True, database=None)
settings.register_profile("nightly", settings.get_profile("desk"), max_examples=1000)


def pytest_configure(config: pytest.Config) -> None:
    night = config.option.markexpr == "nightly"
    settings.load_profile("nightly" if night else "ci" if os.environ.get("CI") else "desk")
