"""A clock that stands until it is turned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest


class Clock:
    """Stands in for the module `time`: what `monotonic` says is `now_s`."""

    def __init__(self, now_s: float = 1_000.0) -> None:
        self.now_s = now_s

    def monotonic(self) -> float:
        """See `time.monotonic`."""
        return self.now_s


@contextmanager
def turned_by_hand(*modules: ModuleType) -> Iterator[Clock]:
    """These modules read this clock meanwhile."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "time", clock)
        yield clock
