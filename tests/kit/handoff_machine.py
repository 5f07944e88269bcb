"""`Handoff` in any order of events, against what must hold of a request in two places."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fabric.core.traffic.handoff import Action, Event, Handoff, Stage

ENDS = (Event.ENDED, Event.CLOSED)


class HandoffMachine(RuleBasedStateMachine):
    """Keeps its own books of what is open where."""

    def __init__(self) -> None:
        super().__init__()
        self.handoff = Handoff()
        self.now = 0
        self.reserved = False  # at the decode replica, for this request alone
        self.running: str | None = None
        self.over = False
        self.retried = 0

    @precondition(lambda self: not self.over and self.handoff.stage is Stage.NEW)
    @rule()
    def begin(self) -> None:
        assert self.advance(Event.BEGAN) == (Action.RESERVE, Action.PREFILL)
        self.reserved, self.running = True, "prefill"

    @precondition(lambda self: self.running is not None or self.over)
    @rule()
    def refused(self) -> None:
        assert self.advance(Event.REFUSED) == ()
        self.reserved = False

    @precondition(lambda self: self.running == "prefill")
    @rule()
    def sampled(self) -> None:
        assert self.advance(Event.SAMPLED) == (Action.DECODE,)
        self.running = "decode"  # it may never begin: what is reserved stays until it has ended

    @precondition(lambda self: self.running is not None or self.over)
    @rule(event=st.sampled_from(ENDS))
    def ends(self, event: Event) -> None:
        self.finish(event, retry=False)

    @precondition(lambda self: self.running is not None)
    @rule()
    def lost(self) -> None:
        prefill = self.running == "prefill"
        self.finish(Event.PREFILL_LOST if prefill else Event.DECODE_LOST, retry=True)

    @precondition(lambda self: not self.over)
    @rule(event=st.sampled_from(list(Event)))
    def impossible(self, event: Event) -> None:
        possible: dict[str | None, tuple[Event, ...]] = {
            None: (Event.BEGAN,),
            "prefill": (Event.REFUSED, Event.SAMPLED, Event.PREFILL_LOST, *ENDS),
            "decode": (Event.REFUSED, Event.DECODE_LOST, *ENDS),
        }
        if event in possible[self.running]:
            return
        before = self.handoff.stage
        try:
            self.handoff.advance(event, self.now)
        except ValueError:
            assert self.handoff.stage is before
        else:
            raise AssertionError(f"{event} while {self.running}")

    @invariant()
    def sound(self) -> None:
        self.handoff.check()
        assert self.handoff.reserved == self.reserved, "who keeps blocks for whom"
        assert (self.handoff.stage is Stage.OVER) == self.over

    def finish(self, event: Event, *, retry: bool) -> None:
        if event is Event.ENDED and self.running == "decode":
            self.reserved = False  # used up
        actions = self.advance(event)
        wanted = ([Action.GIVE_UP] if self.reserved else []) + ([Action.RETRY] if retry else [])
        assert list(actions) == ([] if self.over else wanted)
        self.reserved, self.running, self.over = False, None, True

    def advance(self, event: Event) -> tuple[Action, ...]:
        self.now += 1
        return self.handoff.advance(event, self.now)
