"""`Journey` and `Quarantine` together, against a fleet that loses replicas at any time.

The model's requests draw known tokens; some of them kill the replica that computes a certain token
of theirs. What must hold: a client's tokens have no gap and no repeat, a request that kills is
found guilty by its second death, and nobody else ever is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kit.engine_loop import ask

from fabric.core.request import Finish, Request, TokenChunk
from fabric.core.traffic.journey import ATTEMPTS, Broken, GivenUp, Journey
from fabric.core.traffic.quarantine import Quarantine

REPLICAS = ("r0", "r1", "r2")
LENGTH = 6


@dataclass(slots=True)
class Client:
    """One request. `deadly_at`: the token at which it kills its replica (None: it is harmless)."""

    journey: Journey
    deadly_at: int | None
    on: str | None = None
    record: Request | None = None
    got: list[TokenChunk] = field(default_factory=list)
    killed: int = 0
    late: list[tuple[int, TokenChunk]] = field(default_factory=list)

    @property
    def at(self) -> int:
        """The token that it draws next."""
        return self.journey.tokens


class JourneyMachine(RuleBasedStateMachine):
    """Sends, tokens, losses, late chunks of lost replicas."""

    @initialize(deadly=st.lists(st.none() | st.none() | st.integers(0, 3), min_size=1, max_size=6))
    def build(self, deadly: list[int | None]) -> None:
        self.quarantine = Quarantine()
        self.clients = {
            f"q{i}": Client(Journey(ask(f"q{i}", [1], max_tokens=LENGTH)), at)
            for i, at in enumerate(deadly)
        }

    @precondition(lambda self: self._waiting())
    @rule(which=st.integers(0, 9), where=st.sampled_from(REPLICAS))
    def send(self, which: int, where: str) -> None:
        if self.quarantine.tests(where):
            return
        waiting = self._waiting()
        name = waiting[which % len(waiting)]
        one = self.clients[name]
        self.quarantine.sent(name, where)
        one.on, one.record = where, one.journey.outgoing()
        sent = (tuple(range(one.at)),) if one.journey.losses else ()
        assert one.record.generated == sent, "what was sent goes along"

    @precondition(lambda self: self._running())
    @rule(which=st.integers(0, 9))
    def draw(self, which: int) -> None:
        """One request computes its next token, or dies of it."""
        running = self._running()
        name = running[which % len(running)]
        one = self.clients[name]
        assert one.on is not None and one.record is not None
        if one.deadly_at == one.at:
            one.killed += 1
            self._die(one.on, told=one.deadly_at % 2 == 0)
            return
        last = one.at == LENGTH - 1
        chunk = TokenChunk(
            request_id=one.record.request_id,
            choice=0,
            position=one.at,
            tokens=(one.at,),
            finish=Finish.LENGTH if last else None,
        )
        one.late.append((one.journey.losses, chunk))
        news = one.journey.note((chunk,))
        assert news, "a token lost"
        one.got += news
        tested = name in self.quarantine._unproven and self.quarantine.tests(one.on)
        self.quarantine.proven(name)
        if tested and name in self.quarantine._deaths:
            raise AssertionError("it has proven itself, and is still under suspicion")
        if one.journey.done:
            self.quarantine.forget(name)
            one.on = None

    @rule(where=st.sampled_from(REPLICAS))
    def kill(self, where: str) -> None:
        """From outside, where nobody has to prove anything: else the verdict could be wrong."""
        if not self.quarantine.tests(where):
            self._die(where, told=False)

    @precondition(lambda self: self._running())
    @rule(which=st.integers(0, 9))
    def not_sent(self, which: int) -> None:
        running = self._running()
        name = running[which % len(running)]
        self.quarantine.left(name)
        self._lose(name)

    @precondition(lambda self: any(one.late for one in self.clients.values()))
    @rule(which=st.integers(0, 9))
    def say_late(self, which: int) -> None:
        """A replica that is lost speaks once more: nobody hears it."""
        for one in self.clients.values():
            old = [chunk for losses, chunk in one.late if losses < one.journey.losses]
            if old and not one.journey.done:
                try:
                    assert one.journey.note((old[which % len(old)],)) == (), "a token doubled"
                except Broken as broken:
                    raise AssertionError("it is heard as the one of now") from broken

    @invariant()
    def exact(self) -> None:
        if not hasattr(self, "quarantine"):
            return
        self.quarantine.check()
        for name, one in self.clients.items():
            one.journey.check()
            tokens = [token for chunk in one.got for token in chunk.tokens]
            assert tokens == list(range(len(tokens))), "a gap or a repeat"
            assert all(chunk.request_id == name for chunk in one.got)
            assert name not in self.quarantine.guilty or one.deadly_at is not None, "innocent"

    def _die(self, where: str, *, told: bool) -> None:
        there = [name for name, one in self.clients.items() if one.on == where]
        alone = [n for n in there if n in self.quarantine._unproven]
        found = self.quarantine.died(where, there if told else None)
        for name in found:
            one = self.clients[name]
            assert one.killed >= 1 and alone == [name], "another one could have been it"
        for name in there:
            if name in found:
                self.quarantine.forget(name)
                del self.clients[name]
            else:
                enough = 2 if told else 3
                killed = self.clients[name].killed
                assert killed < enough or alone != [name], "it has killed often enough"
                self._lose(name)

    def _lose(self, name: str) -> None:
        one = self.clients[name]
        one.on = None
        if isinstance(one.journey.lost(), GivenUp):
            assert one.journey._fruitless == ATTEMPTS
            self.quarantine.forget(name)
            del self.clients[name]

    def _waiting(self) -> list[str]:
        return [n for n, one in self.clients.items() if one.on is None and not one.journey.done]

    def _running(self) -> list[str]:
        return [name for name, one in self.clients.items() if one.on is not None]
