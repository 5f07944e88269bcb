"""An event loop that turns only when a machine says so."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

TURNS = 12  # in which whatever can go on has gone on

T = TypeVar("T")


class HandLoop:
    """`spin` lets everything go on that waits for nothing from outside."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # Machines look at what becomes of tasks themselves. A planted bug leaves some that nobody
        # looks at, and to log those while they are collected can break whatever runs just then.
        self._loop.set_exception_handler(lambda *_: None)

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """As far as it gets."""
        task = self._loop.create_task(work)
        self.spin()
        return task

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """To its end."""
        return self._loop.run_until_complete(work)

    def spin(self) -> None:
        """Some turns."""
        self.run(self._turns())

    def close(self) -> None:
        """Nothing is left running."""
        self.run(self._clear())
        self._loop.close()

    async def _turns(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)

    async def _clear(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
