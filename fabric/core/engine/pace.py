"""How long a step takes, learnt from the steps; and so how many prompt tokens one may hold.

    step = base + token * prompt tokens + decode * rows of one token
                + context * KV tokens those rows read + pair * (query, key) pairs of the prompts

The coefficients begin with what was measured at warm-up and follow every (plan, elapsed). A chunk
of a prompt is cut where the step would take longer than the decodes beside it can wait: `Budget`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fabric.core.configs import StepCosts
from fabric.core.engine.plan import StepPlan

# How far one step moves the coefficients towards what was measured.
LEARNING_RATE = 0.1
# A step that took this many times what was predicted was disturbed (another process, a page fault):
# it counts as that much, and no more.
OUTLIER = 3.0
# A coefficient stays above this part of where it began.
LEAST_PART = 0.02
# Aim below the target: half of all steps take longer than predicted.
AIM = 0.9
# A decode that is ahead of its target lets a step last this many targets, and no more: what was
# saved may be spent on others, but a reader should not see the text stop for longer.
STALL_TARGETS = 4


@dataclass(slots=True)
class Load:
    """What a step is made of; counts."""

    tokens: int = 0
    decodes: int = 0
    context: int = 0
    pairs: int = 0

    def add(self, start: int, count: int) -> None:
        """One row more: history positions [start, start + count)."""
        if count == 1:
            self.decodes += 1
            self.context += start
        else:
            self.tokens += count
            self.pairs += count * (2 * start + count) // 2


def load_of(plan: StepPlan) -> Load:
    """What a plan asks of a step."""
    load = Load()
    for step in plan.steps:
        load.add(step.start, step.count)
    return load


class Pace:
    """The step-time model of one engine. Floats, in ns; the same inputs give the same numbers."""

    __slots__ = ("_least", "_scales", "base", "context", "decode", "pair", "token")

    def __init__(self, costs: StepCosts) -> None:
        self.base = float(costs.step_ns)
        self.token = float(costs.token_ns)
        self.decode = float(costs.decode_ns)
        self.context = float(costs.context_ns)
        self.pair = float(costs.pair_ns)
        # Normalised least mean squares (Nagumo and Noda, 1967), each coefficient on the scale that
        # it began with: an error goes to those that had the greatest part in the step.
        scales = (self.base, self.token, self.decode, self.context, self.pair)
        if min(scales) <= 0:
            raise ValueError("a step's costs must be positive: they are scales too")
        self._scales = tuple(scale * scale for scale in scales)
        self._least = tuple(scale * LEAST_PART for scale in scales)

    def step_ns(self, load: Load) -> float:
        """What such a step takes."""
        return (
            self.base
            + self.token * load.tokens
            + self.decode * load.decodes
            + self.context * load.context
            + self.pair * load.pairs
        )

    def learn(self, load: Load, elapsed_ns: int) -> None:
        """A step took so long. No time at all teaches nothing: a clock that stands."""
        if elapsed_ns <= 0:
            return
        predicted = self.step_ns(load)
        error = min(elapsed_ns, OUTLIER * predicted) - predicted
        # Spelt out, in this order: every step of every engine comes by, and `sum` of floats is not
        # the same number in all versions of Python.
        base, token, decode, context, pair = self._scales
        power = base
        power += (by_token := token * load.tokens) * load.tokens
        power += (by_decode := decode * load.decodes) * load.decodes
        power += (by_context := context * load.context) * load.context
        power += (by_pair := pair * load.pairs) * load.pairs
        gain = LEARNING_RATE * error / power
        least = self._least
        self.base = max(self.base + gain * base, least[0])
        if load.tokens:  # what was not in the step learns nothing from it
            self.token = max(self.token + gain * by_token, least[1])
            self.pair = max(self.pair + gain * by_pair, least[4])
        if load.decodes:
            self.decode = max(self.decode + gain * by_decode, least[2])
            self.context = max(self.context + gain * by_context, least[3])

    def chunk(self, wanted: int, start: int, left_ns: float) -> int:
        """How many of `wanted` prompt tokens from position `start` on fit into `left_ns`; in any
        time at least one."""
        if left_ns <= 0:
            return 0
        # Linear, with the attention of the last one that was asked for: a little too dear.
        each = self.token + self.pair * (start + wanted / 2)
        return wanted if each * wanted <= left_ns else max(int(left_ns / each), 1)

    def row_ns(self, context: int) -> float:
        """What a decode at that context adds to a step."""
        return self.decode + self.context * context

    def chunk_ns(self, count: int, start: int) -> float:
        """What so many prompt tokens add to a step."""
        return count * (self.token + self.pair * (start + count / 2))
