"""Tiers in the engine: who goes first, who gives way, how long a step may be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kit.engine_loop import EngineLoop, ask

from fabric.core.configs import EngineConfig, StepCosts
from fabric.core.engine.pace import Load, Pace
from fabric.core.engine.plan import StepPlan
from fabric.core.engine.standing import Standings
from fabric.core.request import Request
from fabric.core.tiers import BUILT_IN, Tier

MS = 1_000_000
COSTS = StepCosts(step_ns=10 * MS, token_ns=MS, decode_ns=MS, context_ns=1, pair_ns=1e-3)
CONFIG = EngineConfig(
    block_size=4,
    num_blocks=256,
    num_host_blocks=256,
    max_sequences=8,
    step_tokens=256,
    chunk_tokens=256,
    context_limit=512,
    costs=COSTS,
)


class Timed(EngineLoop):
    """Every step takes what `COSTS` say."""

    def turn(self) -> StepPlan:
        """One step; its plan."""
        plan = self.engine.schedule(self.now)
        assert plan is not None
        self.plans.append(plan)
        result = self.worker.execute(plan)
        self.now += self.took_ns(plan)
        self.chunks.extend(self.engine.commit(plan, result, self.now))
        self.engine.check()
        return plan

    def took_ns(self, plan: StepPlan) -> int:
        """By the model."""
        load = Load()
        for step in plan.steps:
            load.add(step.start, step.count)
        return round(Pace(COSTS).step_ns(load))

    def rows(self, plan: StepPlan) -> dict[str, int]:
        """Tokens of each request in a plan."""
        running = self.engine._scheduler.running.items
        names = {s.number: s.group.request.request_id for s in running}
        return {names.get(step.sequence, "ended"): step.count for step in plan.steps}


def of(tier: str, request_id: str, tokens: int, now: int = 0, **fields: object) -> Request:
    """A request of a tier, of so many prompt tokens that nobody else has."""
    base = sum(map(ord, request_id)) * 7
    sampling = {"ignore_eos": True} | fields
    request = ask(request_id, (base + i for i in range(tokens)), arrival=now, **sampling)
    return replace(request, tier=tier)


def test_the_better_tier_goes_first_and_in_a_tier_who_is_due_first() -> None:
    loop = Timed(replace(CONFIG, max_sequences=1))
    loop.add(of("batch", "running", 4, max_tokens=2))
    loop.turn()
    loop.add(
        of("standard", "later", 4, now=2, max_tokens=1),
        of("standard", "earlier", 4, now=1, max_tokens=1),
        replace(of("standard", "hurried", 4, now=3, max_tokens=1), deadline=1_000 * MS),
        of("nonsense", "last", 4, now=0, max_tokens=1),
    )
    loop.run()
    ends = [chunk.request_id for chunk in loop.chunks if chunk.finish]
    assert ends == ["running", "hurried", "earlier", "later", "last"]


def test_interactive_takes_a_place_at_once_and_nothing_is_computed_twice() -> None:
    alone = Timed(replace(CONFIG, max_sequences=8))
    loop = Timed(replace(CONFIG, max_sequences=2))
    work = [of("batch", name, 40, max_tokens=12) for name in ("one", "two", "three")]
    for engine in (alone, loop):
        engine.add(*work)
    alone.add(of("interactive", "urgent", 20, max_tokens=3))
    alone.run()
    loop.turn()
    loop.turn()
    loop.add(of("interactive", "urgent", 20, now=loop.now, max_tokens=3))
    assert "urgent" in loop.rows(loop.turn())
    loop.run()
    assert loop.everything() == alone.everything()
    snapshot = loop.snapshot()
    assert (snapshot.preemptions_total, snapshot.swaps_total) == (1, 1)
    assert (snapshot.preempted_tokens_total, snapshot.dropped_tokens_total) == (41, 0)
    assert snapshot.prompt_tokens_total == 3 * 40 + 20


def test_standard_preempts_batch_when_half_of_its_time_is_gone() -> None:
    loop = Timed(replace(CONFIG, max_sequences=1))
    loop.add(of("batch", "long", 8, max_tokens=400))
    loop.turn()
    loop.add(of("standard", "patient", 8, now=loop.now, max_tokens=1))
    began = loop.now
    while loop.finish("patient") is None:
        loop.turn()
    assert 1_000 * MS <= loop.now - began <= 1_060 * MS
    assert loop.snapshot().preemptions_total == 1


def test_one_tier_never_preempts_for_a_place() -> None:
    loop = Timed(replace(CONFIG, max_sequences=1))
    loop.add(of("batch", "first", 8, max_tokens=100))
    loop.turn()
    loop.add(replace(of("batch", "second", 8, now=loop.now, max_tokens=1), deadline=loop.now + 1))
    loop.run()
    assert loop.snapshot().preemptions_total == 0


def decoding(loop: Timed, *requests: Request) -> None:
    """Let requests come as far as their first tokens."""
    loop.add(*requests)
    while not all(loop.tokens(one.request_id) for one in requests):
        loop.turn()


def test_a_long_prompt_is_cut_to_what_the_decodes_can_wait() -> None:
    loop = Timed(CONFIG)
    decoding(loop, of("standard", "reader", 4, max_tokens=100))
    loop.add(of("standard", "long", 250, max_tokens=1))
    plan = loop.turn()
    # 200 ms, of which nine tenths are aimed at, less 10 for the step and 1 for the reader.
    assert 160 <= loop.rows(plan)["long"] <= 169
    for _ in range(3):
        assert loop.took_ns(loop.turn()) <= 200 * MS


def test_without_decodes_a_prompt_gets_the_whole_step() -> None:
    loop = Timed(CONFIG)
    loop.add(of("standard", "long", 300, max_tokens=1))
    assert [step.count for step in loop.turn().steps] == [256]


def test_what_decodes_are_ahead_may_be_spent_on_a_prompt() -> None:
    loop = Timed(CONFIG)
    decoding(loop, of("standard", "reader", 4, max_tokens=100))
    for _ in range(5):
        loop.turn()  # 11 ms each, where 200 are promised
    loop.add(of("standard", "long", 250, now=loop.now, max_tokens=2))
    assert loop.rows(loop.turn())["long"] == 250


def test_prompts_go_on_where_decodes_alone_are_too_slow() -> None:
    tiers = (Tier(name="standard", ttft_ms=100, tpot_ms=5),)
    loop = Timed(replace(CONFIG, tiers=tiers))
    decoding(loop, of("standard", "reader", 4, max_tokens=100))
    loop.add(of("standard", "long", 100, max_tokens=1))
    assert loop.rows(loop.turn())["long"] == 256 // 32
    loop.run()


def test_batch_stands_still_beside_an_interactive_prompt_and_keeps_its_blocks() -> None:
    loop = Timed(replace(CONFIG, max_sequences=8))
    decoding(loop, *(of("batch", f"b{i}", 4, max_tokens=50) for i in range(6)))
    for _ in range(2):
        loop.turn()
    loop.add(of("interactive", "urgent", 30, now=loop.now, max_tokens=2))
    rows = loop.rows(loop.turn())
    # A tenth of 10 + 30 ms: four rows, if they read no context.
    assert rows["urgent"] == 30 and len(rows) == 1 + 3
    assert loop.snapshot().preemptions_total == 0
    loop.run()


def test_late_batch_does_not_give_way() -> None:
    tiers = (BUILT_IN[0], Tier(name="batch", ttft_ms=1000, tpot_ms=1))
    loop = Timed(replace(CONFIG, tiers=tiers))
    decoding(loop, *(of("batch", f"b{i}", 4, max_tokens=50) for i in range(6)))
    loop.turn()
    loop.add(of("interactive", "urgent", 30, now=loop.now, max_tokens=2))
    assert len(loop.rows(loop.turn())) == 1 + 6


def test_batch_leaves_interactive_decodes_ahead_of_their_target() -> None:
    loop = Timed(replace(CONFIG, max_sequences=64, num_blocks=1024))
    decoding(loop, *(of("batch", f"b{i}", 4, max_tokens=60) for i in range(60)))
    loop.turn()
    decoding(loop, of("interactive", "reader", 4, now=loop.now, max_tokens=20))
    for _ in range(10):
        assert loop.took_ns(loop.turn()) <= 51 * MS, "half of 100 ms, and a row of rounding"
    loop.run()


def test_while_the_first_tier_comes_no_step_is_long() -> None:
    loop = Timed(
        replace(
            CONFIG,
            tiers=(
                Tier(name="interactive", ttft_ms=100, tpot_ms=90),
                Tier(name="batch", ttft_ms=9000, tpot_ms=900),
            ),
        )
    )
    loop.add(of("batch", "before", 100, max_tokens=1))
    assert loop.took_ns(loop.turn()) > 100 * MS
    decoding(loop, of("interactive", "urgent", 4, now=loop.now, max_tokens=1))
    loop.add(of("batch", "after", 100, now=loop.now, max_tokens=1))
    assert loop.took_ns(loop.turn()) <= 51 * MS
    loop.run()
    loop.now += 60_000 * MS
    loop.add(of("batch", "much later", 100, now=loop.now, max_tokens=1))
    assert loop.took_ns(loop.turn()) > 100 * MS


def test_nobody_starves_behind_a_better_tier() -> None:
    """One place, and always somebody of the first tier in front of it."""
    loop = Timed(replace(CONFIG, max_sequences=1, patience_ns=1_000 * MS))
    loop.add(*(of("batch", f"b{i}", 40, max_tokens=5) for i in range(3)))
    number, ended = 0, {}
    while len(ended) < 3:
        if loop.snapshot().sequences_by_tier[0] < 2:
            number += 1
            loop.add(of("interactive", f"i{number}", 10, now=loop.now, max_tokens=5))
        loop.turn()
        for name in ("b0", "b1", "b2"):
            if loop.finish(name) is not None:
                ended.setdefault(name, loop.now)
        assert loop.now < 20_000 * MS, "starved"
    # Patience, an eighth of it between two looks, and about 100 ms as the first of all.
    assert [ended[f"b{i}"] <= (i + 1) * 1_250 * MS for i in range(3)] == [True] * 3
    assert loop.snapshot().preemptions_total <= 6, "the aged one is not preempted again"


def test_who_is_served_as_a_better_tier_goes_as_one_of_it() -> None:
    of = Standings(BUILT_IN).of
    batch = replace(ask("a", [1], arrival=5), tier="batch", served_as="interactive")
    raised, own, next_one = of(batch), of(replace(batch, served_as=None)), of(ask("b", [1]))
    assert (raised.rank, raised.due, raised.preempts_from) == (0, 5 + 500 * MS, 5)
    assert (own.rank, own.due) == (2, 5 + 60_000 * MS)
    assert raised.tpot_ns == own.tpot_ns == 2_000 * MS, "it need not be fast as well"
    assert next_one.rank == 1


def test_a_pace_learns_what_steps_take() -> None:
    """A machine of other costs, three times as dear here and half there: 5 % after 1,500 steps."""
    truth = Pace(StepCosts(step_ns=20e6, token_ns=3e6, decode_ns=0.5e6, context_ns=400, pair_ns=20))
    pace = Pace(StepCosts(step_ns=8e6, token_ns=1e6, decode_ns=1e6, context_ns=500, pair_ns=20))
    mixes = [Load(), Load()]
    for number in range(1_500):
        decodes = number % 17
        load = Load(tokens=number % 5 * 50, decodes=decodes, context=decodes * (number % 700))
        load.pairs = load.tokens * (number % 300)
        pace.learn(load, round(truth.step_ns(load)))
        mixes.append(load)
    for load in mixes[-60:]:
        assert pace.step_ns(load) == pytest.approx(truth.step_ns(load), rel=0.05)


def test_a_stall_teaches_little_and_a_clock_that_stands_nothing() -> None:
    pace = Pace(COSTS)
    load = Load(tokens=100)
    before = pace.step_ns(load)
    pace.learn(load, 0)
    assert pace.step_ns(load) == before
    pace.learn(load, 60_000 * MS)
    assert pace.step_ns(load) <= 1.25 * before
    for _ in range(1000):
        pace.learn(load, 1)
    assert 0 < pace.step_ns(load) < 0.1 * before and pace.chunk(10, 0, 1e9) == 10


def test_a_tier_of_another_name_comes_last_and_there_must_be_one() -> None:
    standing = Standings(BUILT_IN).of(of("unheard-of", "x", 1))
    assert standing.rank == len(BUILT_IN) - 1
    with pytest.raises(ValueError, match="at least one tier"):
        Standings(())
