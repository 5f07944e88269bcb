"""At zero replicas: exactly one Serve call waits for one, however many requests do.

Serve starts a replica when a call is pending, and reckons with one replica for so many calls. So
the requests themselves wait in the dispatcher's queue, where their order is decided, and one call
without meaning knocks for all of them.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable

from fabric.cluster.link import Calls

log = logging.getLogger("ray.serve")


class WakeUp:
    """`on_awake` is awaited once a replica has answered: it asks for the fleet's news at once."""

    def __init__(self, calls: Calls, on_awake: Callable[[], Awaitable[None]]) -> None:
        self._calls = calls
        self._on_awake = on_awake
        self._task: asyncio.Task[None] | None = None

    def knock(self) -> None:
        """Somebody waits and nobody is there. A knock that is being waited for is enough."""
        if self._task is None or self._task.done():
            # Outside of any HTTP request's context: Serve would end the call with the request.
            self._task = asyncio.get_running_loop().create_task(
                self._wait(), context=contextvars.Context()
            )

    async def _wait(self) -> None:
        try:
            await self._calls.wake()
        except Exception as error:  # noqa: BLE001 - Serve raises many kinds; the next beat knocks
            log.warning("waking a replica: %s", type(error).__name__)
            return
        await self._on_awake()
