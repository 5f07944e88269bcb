"""`WakeUp` and `Rebuilds` against what little they must remember."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kit.hand_loop import HandLoop

from fabric.cluster.rebuilds import REBUILDS_MAX, WITHIN_S, Rebuilds
from fabric.cluster.wake_up import WakeUp


class WakeMachine(RuleBasedStateMachine):
    """Many knock; one call waits, ends well or badly, and only then the next knock counts."""

    cold_starts = True

    @initialize()
    def build(self) -> None:
        self.loop = HandLoop()
        self.calls: list[asyncio.Future[None]] = []  # `link.Calls` as far as it is needed
        self.awake: list[asyncio.Future[None]] = []
        self.waits = self.reads = False  # a call is open; the fleet's news are being asked for
        self.made = 0
        self.wake_up = WakeUp(self, self.news)  # type: ignore[arg-type]

    async def wake(self) -> None:
        """See `link.Calls`."""
        self.made += 1
        self.calls.append(asyncio.get_running_loop().create_future())
        await self.calls[-1]

    async def news(self) -> None:
        """Until the machine says so."""
        self.awake.append(asyncio.get_running_loop().create_future())
        await self.awake[-1]

    @rule(times=st.integers(1, 3))
    def knock(self, times: int) -> None:
        async def knocks() -> None:
            for _ in range(times):
                self.wake_up.knock()

        before = self.made
        self.loop.run(knocks())
        self.loop.spin()
        assert self.made == before + (not self.waits and not self.reads), "one call, and only one"
        self.waits = not self.reads

    @precondition(lambda self: self.waits)
    @rule(well=st.booleans())
    def answered(self, well: bool) -> None:
        call = self.calls.pop()
        if well:
            call.set_result(None)
        else:
            call.set_exception(ConnectionError("planted"))
        self.loop.spin()
        self.waits, self.reads = False, well

    @precondition(lambda self: self.reads)
    @rule(well=st.booleans())
    def told(self, well: bool) -> None:
        """What becomes of the news is nothing to who knocks next."""
        self.reads = False
        news = self.awake.pop()
        if well:
            news.set_result(None)
        else:
            news.set_exception(OSError("planted"))
        self.loop.spin()
        task: Any = self.wake_up._task
        task.exception()

    @invariant()
    def exact(self) -> None:
        if hasattr(self, "wake_up"):
            assert (len(self.calls), len(self.awake)) == (self.waits, self.reads)

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.close()


class RebuildMachine(RuleBasedStateMachine):
    """An engine breaks again and again; the model keeps every time that it was made anew."""

    @initialize()
    def build(self) -> None:
        self.rebuilds = Rebuilds()
        self.now_s = 100.0
        self.begun: list[float] = []
        self.hung = 0
        self.under_way = self.given_up = False

    @rule(share=st.sampled_from([0.01, 0.2, 0.4, 0.5, 1.0]))
    def passes(self, share: float) -> None:
        self.now_s += share * WITHIN_S

    @rule(hung=st.booleans(), at_once=st.booleans())
    def breaks(self, hung: bool, at_once: bool) -> None:
        """And is made anew, if it may be: that takes a while, or no time at all."""
        recent = [begun for begun in self.begun if self.now_s - begun <= WITHIN_S]
        may = not self.under_way and not self.given_up and len(recent) < REBUILDS_MAX
        assert self.rebuilds.allowed(self.now_s) == may, "once too often, or not often enough"
        if may:
            self.rebuilds.begin(self.now_s, hung=hung)
            self.begun.append(self.now_s)
            self.hung += hung
            self.under_way = True
            if at_once:
                self.ends(failed=False)

    @precondition(lambda self: self.under_way)
    @rule(failed=st.sampled_from([False, False, False, True]))
    def ends(self, failed: bool) -> None:
        """As `EngineReplica` does."""
        if failed:
            self.rebuilds.stop()
        self.rebuilds.under_way = self.under_way = False
        self.given_up = self.given_up or failed

    @invariant()
    def exact(self) -> None:
        if hasattr(self, "rebuilds"):
            assert (self.rebuilds.total, self.rebuilds.hung) == (len(self.begun), self.hung)
            assert self.rebuilds.under_way == self.under_way
