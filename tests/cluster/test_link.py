"""A `Link` holds under any order of events, and the search sees planted bugs."""

from __future__ import annotations

from hypothesis import settings
from kit.link_machine import LinkMachine

TestLink = LinkMachine.TestCase
TestLink.settings = settings(max_examples=30, stateful_step_count=30)
