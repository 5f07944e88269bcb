"""Everything here runs in a network of its own where the system allows it."""

from __future__ import annotations

import pytest
from kit.private_network import enter_private_network


@pytest.fixture(scope="session", autouse=True)
def private_network() -> None:
    enter_private_network()
