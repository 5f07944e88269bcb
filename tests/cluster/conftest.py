"""Everything here runs in a network of its own where the system allows it."""

from __future__ import annotations

import pytest
from kit.demo import demo_model
from kit.private_network import enter_private_network

__all__ = ["demo_model"]


@pytest.fixture(scope="session", autouse=True)
def private_network(demo_model: object) -> None:
    """The demo model first: from in there it can't be fetched."""
    enter_private_network()
