"""Many decode steps at once, where each of them would decide the same: for a simulator's clock.

A stretch is steady if every running sequence decodes one token a step, none ends, nobody waits, and
blocks are there for all of it. Then schedule and commit, step by step, change numbers in a way that
is known beforehand; what is left of a step is what others could find out later, in its order: who
takes which block, which block is published when, what the step's time teaches `Pace`. The state
afterwards is the same, bit for bit: tests/core/test_forward.py holds it against the single steps.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from typing import TYPE_CHECKING

from fabric.core.engine.pace import STALL_TARGETS, Load
from fabric.core.engine.sequence import Sequence
from fabric.core.request import TokenChunk

if TYPE_CHECKING:
    from fabric.core.engine.engine import Engine


def steady_steps(engine: Engine, most: int) -> int:
    """How many of the next `most` steps are all alike, whenever they begin before `steady_until`.

    0 as well where it would take a closer look to know.
    """
    scheduler = engine._scheduler
    rows = scheduler.running.items
    pending = scheduler._copies or scheduler._drops or scheduler._exports or scheduler.must_copy
    handovers = engine._handovers.expected or engine._handovers.exports
    if not rows or scheduler.waiting.items or engine._flights or engine._leaving:
        return 0
    if pending or handovers or engine.config.micro_batches > 1:
        return 0
    if rows[0].of_class != rows[-1].of_class:  # then some may lend their time to others
        return 0
    size = engine.config.block_size
    for one in rows:
        length = len(one.tokens)
        most = min(most, one.limit - length - 1)
        if most <= 0 or not (one.started and one.reported) or one.group.unborn or one.landed:
            return 0
        if length - one.computed != 1 or one.computed < one.prompt_length:
            return 0
        if engine.config.prefix_cache and one.published < one.computed // size:
            return 0
        if one.computed % size and scheduler.writes.first_is_shared(one):
            return 0
        if one.computed % size == 0 and len(one.blocks) * size > one.computed:
            return 0
    return _fed(rows, size, scheduler.pool.free, most)


def running(engine: Engine) -> tuple[Sequence, ...]:
    """Who runs, in the order in which `forward` wants their tokens."""
    return tuple(engine._scheduler.running.items)


def steady_until(engine: Engine) -> int:
    """Each step must begin before it: then it is time to look who stood still for too long (ns)."""
    return engine._scheduler._aging.next_look or 0


def forward(
    engine: Engine, now: int, ends: Listed[int], tokens: Listed[tuple[int, ...]]
) -> list[TokenChunk]:
    """Steps that end at `ends`, the first begun `now` and each other one when that before it ended.
    `tokens`: of each running sequence, in their order, one for each step.

    One chunk a sequence. `ValueError`: these steps are not all alike; nothing has changed.
    """
    scheduler, count = engine._scheduler, len(ends)
    rows = scheduler.running.items
    begins = [now, *ends[:-1]]
    if not count or steady_steps(engine, count) < count or begins[-1] >= steady_until(engine):
        raise ValueError(f"the next {count} steps are not all alike")
    for one, mine in zip(rows, tokens, strict=True):
        outputs = len(one.tokens) - one.prompt_length
        if len(mine) != count or any(
            token in one.stop_tokens and outputs + index >= one.min_tokens
            for index, token in enumerate(mine)
        ):
            raise ValueError("a token for each step, and none that ends a sequence")
    chunks = _say(rows, tokens)
    _blocks(engine, tokens)
    _learn(engine, begins, ends)
    for one in rows:
        one.computed += count
        one.sent = len(one.tokens) - 1  # the last one goes out with the next plan
        one.named_by = engine._next_plan + count - 1
        one.token_due = _due(one, ends)
    engine._next_plan += count
    engine._committed = engine._next_plan - 1
    engine._counters.generated_tokens += count * len(rows)
    return chunks


def _say(rows: Listed[Sequence], tokens: Listed[tuple[int, ...]]) -> list[TokenChunk]:
    return [
        TokenChunk(
            request_id=one.group.request.request_id,
            choice=one.choice,
            position=len(one.tokens) - one.prompt_length,
            tokens=mine,
        )
        for one, mine in zip(rows, tokens, strict=True)
    ]


def _fed(rows: Listed[Sequence], size: int, free: int, most: int) -> int:
    """For so many steps there are blocks: sequence by sequence the next one is known."""
    needed = [0] * most
    for one in rows:
        for step in range(-one.computed % size, most, size):
            needed[step] += 1
    for step, count in enumerate(needed):
        free -= count
        if free < 0:
            return step
    return most


def _blocks(engine: Engine, tokens: Listed[tuple[int, ...]]) -> None:
    """Tokens are appended; who begins a block takes it, who fills one publishes it, step by step,
    in each step all that is planned before all that is committed, as it would have been."""
    size, pool = engine.config.block_size, engine._scheduler.pool
    rows, count = engine._scheduler.running.items, len(tokens[0])
    takes: list[list[Sequence]] = [[] for _ in range(count)]
    fills: list[list[Sequence]] = [[] for _ in range(count)]
    for one, mine in zip(rows, tokens, strict=True):
        for step in range(-one.computed % size, count, size):
            takes[step].append(one)
        for step in range(-(one.computed + 1) % size, count, size):
            fills[step].append(one)
        one.tokens.extend(mine)
    for step in range(count):
        for one in takes[step]:
            added = pool.allocate(1)
            assert added is not None, "a steady stretch has its blocks"
            one.blocks.extend(added)
        if engine.config.prefix_cache:
            for one in fills[step]:
                engine._publish(one, one.computed + step + 1)


def _learn(engine: Engine, begins: Listed[int], ends: Listed[int]) -> None:
    """What each step's time teaches, and how long the engine was busy."""
    rows = engine._scheduler.running.items
    pace, counters = engine._scheduler.pace, engine._counters
    count, context = len(rows), sum(one.computed for one in rows)
    last = engine._last_commit
    for begin, end in zip(begins, ends, strict=True):
        pace.learn(Load(decodes=count, context=context), end - max(begin, last))
        context += count
        last = end
        counters.step_began(begin)
        counters.step_ended(end, more=False)
    engine._last_commit = last


def _due(one: Sequence, ends: Listed[int]) -> int:
    """`Sequence.note_token` at each of these instants: whole numbers, so that the smallest of all
    ways there is the result, in whatever order they are compared."""
    each, count = one.standing.tpot_ns, len(ends)
    assert one.token_due is not None, "it has had a token"
    ways = [end + (STALL_TARGETS - 1 + count - index) * each for index, end in enumerate(ends)]
    return min(one.token_due + count * each, *ways)
