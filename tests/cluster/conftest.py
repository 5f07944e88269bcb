"""Everything here runs in a network of its own where the system allows it."""

from __future__ import annotations

from kit.private_network import enter_private_network

enter_private_network()
