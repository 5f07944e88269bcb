"""What one step may hold: tokens, and time.

    tokens   one for each decoding sequence, the rest for chunks of prompts
    time     as long as the decodes can wait, by their targets (`pace`), for chunks

Where tiers mix, rows of worse ones lend their time to better ones: in a step that computes a prompt
which may preempt them, or that would be too long for a better tier's decodes, a decode that is
ahead of its own target stands still. It keeps its blocks and its place; that costs nobody a swap.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

from fabric.core.configs import EngineConfig
from fabric.core.engine.pace import AIM, Load, Pace
from fabric.core.engine.plan import SequenceStart, SequenceStep
from fabric.core.engine.sequence import Sequence

# The part of the step's tokens that prompts get even where decodes leave no time: they go on.
FLOOR_PART = 32
# Beside a prompt that may preempt them, worse tiers may add this part of its time to the step.
BESIDE = 0.1
# Beside decodes of a better tier they may fill the step up to this part of the target: those get
# ahead of it, and what they are ahead is there for the next prompt of their own tier.
LENT = 0.5


class Budget:
    """The tokens and the time of one step over the `running` sequences, in order of importance.

    `longest_ns`: how long chunks may make a step, whatever the decodes allow (None: any time).
    """

    __slots__ = (
        "_beside_ns",
        "_best",
        "_binding",
        "_chunk_tokens",
        "_floor",
        "_held_ns",
        "_kept_ns",
        "_left_ns",
        "_mixed",
        "_now",
        "_pace",
        "_urgent",
        "left",
        "reserved",
    )

    def __init__(
        self,
        config: EngineConfig,
        pace: Pace,
        running: Listed[Sequence],
        *,
        now: int,
        longest_ns: int | None = None,
    ) -> None:
        self._pace = pace
        self._now = now
        self._chunk_tokens = config.chunk_tokens
        self._floor = max(config.step_tokens // FLOOR_PART, 1)
        self._best = running[0].of_class if running else (0, 0)
        self._mixed = bool(running) and self._best < running[-1].of_class
        self._binding: tuple[int, int] | None = None  # class of the decode that can wait least
        self._urgent: tuple[int, int] | None = None  # best class of the prompts that may preempt
        self._beside_ns = 0.0  # what is left for worse classes beside those
        self._left_ns: float | None = None  # what decodes leave (None: any time) ...
        self._held_ns = 0.0  # ... of which chunks may not use so much,
        self._kept_ns = 0.0  # and worse classes so much
        self.reserved = self._survey(running, longest_ns)
        self.left = config.step_tokens - self.reserved
        assert self.left >= 0, "more sequences run than a step has tokens"

    def open_to(self, sequence: Sequence) -> bool:
        """A sequence that waits would get a token or more."""
        if self.left <= 0:
            return False
        if self._beside(sequence):
            return self._beside_ns > 0 and self._time_left(sequence)
        return self._time_left(sequence) or (self._floor > 0 and not self._worse(sequence))

    def grant(self, sequence: Sequence) -> int:
        """How many tokens a sequence may compute; they are spent."""
        wanted = len(sequence.tokens) - sequence.computed
        if wanted == 1 and self.reserved > 0:
            self.reserved -= 1
            if not self._mixed or self._has_time(sequence):
                return 1
            self.left += 1
            return 0
        granted = min(wanted, self._chunk_tokens, self.left)
        if self._left_ns is not None or self._urgent is not None:
            granted = self._timed(sequence, granted)
        self.left -= granted
        return granted

    def give_back(self, sequence: Sequence, count: int) -> None:
        """Tokens that were granted and found no blocks."""
        self.left += count
        if self._left_ns is not None:
            self._left_ns += self._pace.chunk_ns(count, sequence.computed)

    def _survey(self, running: Listed[Sequence], longest_ns: int | None) -> int:
        """Count the decodes and see how long they can wait."""
        now, mixed = self._now, self._mixed
        decodes = firm = context = 0
        wait_ns: int | None = None
        lending_ns = 0.0
        prompts: list[Sequence] = []
        for sequence in running:
            if sequence.in_flight:
                continue
            if len(sequence.tokens) - sequence.computed > 1:
                prompts.append(sequence)
                continue
            decodes += 1
            due = sequence.token_due
            if due is not None:
                ahead_ns, tpot_ns = due - now, sequence.standing.tpot_ns
                if ahead_ns < tpot_ns:  # who is late is not made up for at the cost of all prompts
                    ahead_ns = tpot_ns
                if wait_ns is None or ahead_ns < wait_ns:
                    wait_ns, self._binding = ahead_ns, sequence.of_class
                    lending_ns = LENT * tpot_ns
            if not mixed or not self._lends(sequence):
                firm += 1
                context += sequence.computed
        if mixed:
            self._find_urgent(prompts)
        if wait_ns is not None or longest_ns is not None:
            load = Load(decodes=firm, context=context)
            limit_ns = longest_ns if wait_ns is None else AIM * wait_ns
            assert limit_ns is not None
            self._left_ns = limit_ns - self._pace.step_ns(load)
            self._kept_ns = max(limit_ns - lending_ns, 0.0)
            if longest_ns is not None:
                self._held_ns = max(limit_ns - longest_ns, 0.0)
                limit_ns = min(limit_ns, longest_ns)
            self._beside_ns = min(self._beside_ns, BESIDE * limit_ns)
        return decodes

    def _find_urgent(self, prompts: list[Sequence]) -> None:
        """The best class with a prompt that may preempt, and what others may add beside it."""
        urgent = [one for one in prompts if one.standing.preempts_from <= self._now]
        if not urgent:
            return
        self._urgent = urgent[0].of_class
        load = Load()
        for one in urgent:
            if one.of_class == self._urgent:
                load.add(one.computed, min(len(one.tokens) - one.computed, self._chunk_tokens))
        self._beside_ns = BESIDE * self._pace.step_ns(load)

    def _lends(self, sequence: Sequence) -> bool:
        """It may stand still: somebody better runs, and it is ahead of its target."""
        due = sequence.token_due
        if due is None or sequence.of_class <= self._best:
            return False
        return due - self._now > sequence.standing.tpot_ns

    def _has_time(self, sequence: Sequence) -> bool:
        """A decode of a mixed step runs: it lends nothing, or its row fits into the time."""
        if not self._lends(sequence):
            return True
        row_ns = self._pace.row_ns(sequence.computed)
        beside = self._beside(sequence)
        if beside and row_ns > self._beside_ns:
            return False
        if self._left_ns is not None:
            if self._worse(sequence) and row_ns > self._left_ns - self._kept_ns:
                return False
            self._left_ns -= row_ns
        if beside:
            self._beside_ns -= row_ns
        return True

    def _beside(self, sequence: Sequence) -> bool:
        """It is of a worse class than a prompt that may preempt."""
        return self._urgent is not None and sequence.of_class > self._urgent

    def _worse(self, sequence: Sequence) -> bool:
        """It is of a worse class than the decode that can wait least."""
        return self._binding is not None and sequence.of_class > self._binding

    def _reserve_ns(self, sequence: Sequence) -> float:
        """Of the time that is left, what its chunk must leave."""
        return max(self._held_ns, self._kept_ns) if self._worse(sequence) else self._held_ns

    def _time_left(self, sequence: Sequence) -> bool:
        return self._left_ns is None or self._left_ns > self._reserve_ns(sequence)

    def _timed(self, sequence: Sequence, wanted: int) -> int:
        """Tokens of a chunk that fit into the time, or the floor; their time is spent."""
        start, pace = sequence.computed, self._pace
        beside = self._beside(sequence)
        count = pace.chunk(wanted, start, self._beside_ns) if beside else wanted
        if self._left_ns is not None:
            count = pace.chunk(count, start, self._left_ns - self._reserve_ns(sequence))
        if not beside and not self._worse(sequence):
            count = max(count, min(wanted, self._floor))
            self._floor = max(self._floor - count, 0)
        cost_ns = pace.chunk_ns(count, start)
        if self._left_ns is not None:
            self._left_ns -= cost_ns
        if beside:
            self._beside_ns -= cost_ns
        return count


class Pass:
    """What one scheduling pass has decided so far."""

    __slots__ = ("budget", "now", "plan_id", "preempted", "sequences", "starts", "steps")

    def __init__(self, plan_id: int, now: int) -> None:
        self.plan_id = plan_id
        self.now = now
        self.budget: Budget
        self.steps: list[SequenceStep] = []
        self.starts: list[SequenceStart] = []
        self.sequences: list[Sequence] = []
        self.preempted = False
