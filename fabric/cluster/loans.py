"""Prefixes that replicas lend each other, on a replica's asyncio thread: both ends.

    borrower                                         holder
    generate(request, fetch): engine.borrow
      a run of blocks at a time ── lend(wish) ─────> on the shelf? else engine.lend, collect, put
      porter.take(references) <──── references ────  they stay on the shelf for whoever is next
      it was lost, or wrong ── withdraw(wish) ─────> not on the shelf any more

The borrower asks and takes; nobody else has a part in it. A run is what any replica would have
computed, so it names no request: layout, salts, hash and checksum are checked as in a hand-over
(`porter`). Whatever goes wrong, and when the patience of `core.traffic.fetching` is at its end, the
engine is told to go on with what has come, and why is counted.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fabric.cluster.asking import asking
from fabric.cluster.engine_loop import Command
from fabric.cluster.kv_ends import KvEnds
from fabric.cluster.porter import Ask, Porter, Taken
from fabric.cluster.shelf import Key, Shelf
from fabric.core.engine.borrowing import KvWish
from fabric.core.request import Request
from fabric.core.traffic.fetching import Fetch

# So much travels at once, begun at a multiple of it: what one replica asks for another one may too.
RUN_TOKENS = 256
# A run is copied and put there while the one before is checked and staged here.
RUNS_AT_ONCE = 2
# Beyond so many a holder lends nothing more for now: each waits in a thread for a step.
LENT_AT_ONCE = 4
COMPLAINT_TIMEOUT_S = 5.0
NS_PER_S = 1_000_000_000

log = logging.getLogger("ray.serve")


class Siblings(Protocol):
    """Calls to other replicas of the pool."""

    def lend(self, replica_id: str, wish: KvWish, /) -> Any:
        """`Loans.lend` there: awaitable."""
        ...

    def withdraw(self, replica_id: str, wish: KvWish, /) -> Any:
        """`Loans.withdraw` there: awaitable."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Lending:
    """`store_bytes`: of what was lent, so much stays in the store. Sizes of a block in tokens, of a
    token's KV in bytes."""

    store_bytes: int
    block_size: int
    kv_token_bytes: int


class Loans:
    """Both ends. What happens is counted in the porter's `counts`."""

    def __init__(
        self, lending: Lending, porter: Porter, ends: KvEnds, ask: Ask, siblings: Siblings | None
    ) -> None:
        self.shelf = Shelf(lending.store_bytes)
        self._lending = lending
        self._porter = porter
        self._ends = ends
        self._ask = ask
        self._siblings = siblings
        self._lent = 0  # runs that are being lent
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- borrower --------------------------------------------------------------------------------

    def borrow(self, request: Request, fetch: Fetch, dispatcher: str) -> Command:
        """Take the request in, to wait for what `fetch` says. It is fetched from now on."""
        name = request.request_id
        command, answered = asking(lambda engine: engine.borrow(name, fetch.tokens), request)
        self._porter.expect(name, dispatcher)
        self._begin(self._fetch(name, fetch, answered))
        return command

    async def _fetch(self, name: str, fetch: Fetch, answered: asyncio.Future[Any]) -> None:
        began, reason = time.monotonic(), "timeout"
        with suppress(TimeoutError):
            async with asyncio.timeout(fetch.patience_ns / NS_PER_S):
                wish = await answered
                if isinstance(wish, KvWish):
                    self._count("loans")
                    reason = await self._take(name, fetch.holder_id, wish)
                    self._count("loan_seconds", time.monotonic() - began)
                else:  # it is here, or there is no room
                    self._count("loans_not_taken")
        await self._porter.give_up(name, reason)

    async def _take(self, name: str, holder_id: str, wish: KvWish) -> str:
        """All runs, a few at once. Why there is something missing, if there is."""
        room, failed = asyncio.Semaphore(RUNS_AT_ONCE), list[str]()

        async def take(run: KvWish) -> None:
            async with room:
                if not failed:
                    outcome = await self._take_run(name, holder_id, run)
                    if outcome is not None:
                        failed.append(outcome)

        runs = cut(wish, self._lending.block_size)
        await asyncio.gather(*(take(run) for run in runs))
        return failed[0] if failed else "incomplete"

    async def _take_run(self, name: str, holder_id: str, run: KvWish) -> str | None:
        """Why it has not come; None: it has."""
        assert self._siblings is not None
        try:
            references: Sequence[Any] = await self._siblings.lend(holder_id, run)
        except Exception as error:  # noqa: BLE001 - the prompt is computed
            # Its name only: whoever keeps the error keeps what it refers to.
            log.warning("borrowing from %s failed: %s", holder_id, type(error).__name__)
            return "unreachable"
        if not references:
            return "missing"
        outcome = await self._porter.take(name, references)
        if outcome is not Taken.ALL:
            if outcome is Taken.WRONG:
                self._begin(self._complain(holder_id, run))
            return "refused"
        self._count("loan_tokens", len(run.digests) * self._lending.block_size)
        return None

    async def _complain(self, holder_id: str, run: KvWish) -> None:
        """If the holder can't be told: who asks next finds out again, and computes it."""
        assert self._siblings is not None
        with suppress(Exception):
            async with asyncio.timeout(COMPLAINT_TIMEOUT_S):
                await self._siblings.withdraw(holder_id, run)

    # -- holder ----------------------------------------------------------------------------------

    async def lend(self, wish: KvWish) -> list[Any]:
        """References to groups with what is wished for, in the store; none: it is not (all) here.
        What has begun goes on without whoever asked: slots are filled, and must be emptied."""
        return list(await asyncio.shield(self._begin(self._lend(wish))))

    def withdraw(self, wish: KvWish) -> None:
        """What was lent for it was lost, or wrong: the next one gets it from the pool."""
        self.shelf.drop(_key(wish))
        self._count("lent_withdrawn")

    async def _lend(self, wish: KvWish) -> tuple[Any, ...]:
        key = _key(wish)
        tokens = len(wish.digests) * self._lending.block_size
        if kept := self.shelf.find(key):
            self._count("lent_tokens_kept", tokens)
            return kept
        if self._lent == LENT_AT_ONCE:
            self._count("lent_not_now")
            return ()
        self._lent += 1
        try:
            export = await self._ask(lambda engine: engine.lend(wish))
            if export is None:
                self._count("lent_not_here")
                return ()
            references = tuple(await asyncio.to_thread(self._ends.depart, export))
        finally:
            self._lent -= 1
        self.shelf.put(key, references, tokens * self._lending.kv_token_bytes)
        self._count("lent_tokens", tokens)
        return references

    def close(self) -> None:
        """The engine and its workers are gone, and what they held."""
        self.shelf.clear()
        for task in self._tasks:
            task.cancel()

    def _begin(self, work: Any) -> asyncio.Task[Any]:
        # Serve knows calls by the request in whose context they are made: two at once in the same
        # one are the same to its router, which looks for the other for ever (Ray 2.60).
        loop = asyncio.get_running_loop()
        task = loop.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _count(self, name: str, amount: float = 1) -> None:
        self._porter.count(name, amount)


def _key(wish: KvWish) -> Key:
    return wish.first, wish.digests[-1]


def cut(wish: KvWish, block_size: int) -> list[KvWish]:
    """In runs of `RUN_TOKENS`, each begun at a multiple of them but for the first."""
    runs, first, digests = [], wish.first, wish.digests
    while digests:
        count = (RUN_TOKENS - first % RUN_TOKENS) // block_size
        runs.append(replace(wish, first=first, digests=digests[:count]))
        first, digests = first + count * block_size, digests[count:]
    return runs
