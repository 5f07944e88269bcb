"""What stands in for a model: a plan goes in, its cost and tokens that anyone can predict come out.

A token is a function of (the request's seed, choice, position). An output ends where the client
says it does: with an end-of-sequence token, or at `max_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fabric.core.engine.plan import Sample, SequenceStart, StepPlan, StepResult
from fabric.sim.clock import NS_PER_MS
from fabric.sim.costs import Costs, StepShape, shape_of

# What rows bring back, made once. 1,024 tokens are enough to tell outputs apart.
FIRST_TOKEN = 100
MOST_AT_ONCE = 512  # steps
SAMPLES = tuple(Sample(token=FIRST_TOKEN + index) for index in range(1024))
NOTHING = Sample(token=None)


@dataclass(slots=True)
class Known:
    """What is kept of a sequence: where its prompt ends, where its output does, what it says."""

    prompt_length: int
    ends_at: int | None
    salt: int


class SyntheticWorker:
    """`execute(plan)` as `worker.Worker` has it, and `step_ns`: what that would have taken.

    `lengths`: seed of a request -> output tokens after which it ends by itself. `preempted` counts,
    by seed, the sequences that came back with a new epoch.
    """

    def __init__(self, costs: Costs, lengths: Mapping[int, int], eos: int | None) -> None:
        self.costs = costs
        self.preempted: dict[int, int] = {}
        self._lengths = lengths
        self._eos = None if eos is None else Sample(token=eos)
        self._known: dict[int, Known] = {}
        self.step_ns = 0
        self.steps_by_ms: dict[int, int] = {}  # how many steps took so many ms

    def execute(self, plan: StepPlan) -> StepResult:
        """The result; `step_ns` is the time that it took."""
        known = self._known
        for number in plan.drops:
            known.pop(number, None)
        for start in plan.starts:
            self._start(start)
        self.step_ns = self.costs.step_ns(shape_of(plan))
        took_ms = -(-self.step_ns // NS_PER_MS)
        self.steps_by_ms[took_ms] = self.steps_by_ms.get(took_ms, 0) + 1
        samples = []
        for step in plan.steps:
            if not step.samples:
                samples.append(NOTHING)
                continue
            sequence = known[step.sequence]
            end = step.start + step.count
            if sequence.ends_at is not None and end >= sequence.ends_at and self._eos is not None:
                samples.append(self._eos)
            else:
                samples.append(SAMPLES[_index(sequence.salt, end)])
        return StepResult(plan_id=plan.plan_id, samples=tuple(samples))

    def foretell(
        self, rows: Sequence[tuple[int, int]], most_ns: int
    ) -> tuple[list[int], list[tuple[int, ...]]]:
        """Of rows (sequence, tokens computed) that all decode: how long each of the next steps
        takes, up to `most_ns` in all, and the tokens of each row; none that ends its sequence."""
        known = [self._known[number] for number, _ in rows]
        left = [
            one.ends_at - computed - 1
            for one, (_, computed) in zip(known, rows, strict=True)
            if one.ends_at is not None
        ]
        most = min(left, default=MOST_AT_ONCE)
        count, context = len(rows), sum(computed for _, computed in rows)
        steps_ns: list[int] = []
        spent = 0
        while len(steps_ns) < min(most, MOST_AT_ONCE) and spent < most_ns:
            context += count
            shape = StepShape(rows=count, tokens=count, context=context, pairs=0, copies=0)
            steps_ns.append(self.costs.step_ns(shape))
            spent += steps_ns[-1]
        tokens = [
            tuple(
                [
                    FIRST_TOKEN + _index(one.salt, computed + step)
                    for step in range(1, len(steps_ns) + 1)
                ]
            )
            for one, (_, computed) in zip(known, rows, strict=True)
        ]
        return steps_ns, tokens

    def note(self, steps_ns: Sequence[int]) -> None:
        """These steps have been done."""
        for step_ns in steps_ns:
            took_ms = -(-step_ns // NS_PER_MS)
            self.steps_by_ms[took_ms] = self.steps_by_ms.get(took_ms, 0) + 1

    def _start(self, start: SequenceStart) -> None:
        seed = start.sampling.seed
        if start.epoch:
            self.preempted[seed] = self.preempted.get(seed, 0) + 1
        length = self._lengths.get(seed)
        # The last output token is sampled at position prompt + length - 1 of the history.
        ends_at = None if length is None else start.prompt_length + length - 1
        self._known[start.sequence] = Known(start.prompt_length, ends_at, _salt(seed, start.choice))


def token_at(seed: int, choice: int, length: int) -> int:
    """What this worker draws after a history of so many tokens."""
    return FIRST_TOKEN + _index(_salt(seed, choice), length)


def _salt(seed: int, choice: int) -> int:
    return seed * 2654435761 + choice * 97


def _index(salt: int, length: int) -> int:
    return (salt + length * 17) & 1023
