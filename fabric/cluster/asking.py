"""A verb of the engine, called between two of its steps, for who waits on the asyncio thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fabric.cluster.engine_loop import Command, EngineLoop
from fabric.core.engine.engine import Engine
from fabric.core.request import Request

# An engine that breaks does not answer.
ASK_TIMEOUT_S = 60.0

Verb = Callable[[Engine], Any]


def asking(verb: Verb, request: Request | None = None) -> tuple[Command, asyncio.Future[Any]]:
    """What to submit, and its answer: what the verb gives, or raises. It comes after `request` was
    taken in; where that is refused it never does."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Any] = loop.create_future()

    def answer(outcome: Any) -> None:
        loop.call_soon_threadsafe(settle, outcome)

    def settle(outcome: Any) -> None:
        if answered.done():
            return
        if isinstance(outcome, Exception):
            answered.set_exception(outcome)
        else:
            answered.set_result(outcome)

    return Command(request=request, ask=verb, answer=answer), answered


async def ask(engine_loop: EngineLoop, verb: Verb) -> Any:
    """The engine's answer. Raises what the verb raises."""
    command, answered = asking(verb)
    engine_loop.submit(command)
    async with asyncio.timeout(ASK_TIMEOUT_S):
        return await answered
