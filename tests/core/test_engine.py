"""The engine's promises one by one, through whole plans executed by the scripted worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from kit.engine_loop import EngineLoop, ask

from fabric.core.configs import EngineConfig, PreemptionCosts
from fabric.core.engine.engine import Accepted, Engine, Refused
from fabric.core.engine.plan import CopyKind, StepResult
from fabric.core.request import Finish, SamplingParams

EOS = 9
CONFIG = EngineConfig(
    block_size=4,
    num_blocks=32,
    num_host_blocks=32,
    max_sequences=8,
    step_tokens=32,
    chunk_tokens=16,
    context_limit=64,
    eos_token_ids=(EOS,),
)


def counting(history: Sequence[int], _length: int, _sampling: SamplingParams, _choice: int) -> int:
    """The next token is the last plus one: EOS follows 8, whatever `min_tokens` says."""
    return history[-1] + 1


def test_a_prompt_is_computed_in_chunks_and_sampled_once_at_its_end() -> None:
    loop = EngineLoop(CONFIG)
    loop.add(ask("a", range(40), max_tokens=3))
    loop.run()
    rows = [(s.start, s.count, s.samples) for plan in loop.plans for s in plan.steps]
    assert rows[:3] == [(0, 16, False), (16, 16, False), (32, 8, True)]
    assert rows[3:] == [(40, 1, True), (41, 1, True)]
    assert [len(plan.starts) for plan in loop.plans] == [1, 0, 0, 0, 0]
    assert [s.tokens for plan in loop.plans for s in plan.steps][3] == (loop.tokens("a")[0],)


def test_decodes_come_before_chunks_in_one_budget() -> None:
    config = replace(CONFIG, step_tokens=8)
    loop = EngineLoop(config)
    loop.add(*(ask(f"d{i}", [i, 1], max_tokens=40) for i in range(3)))
    loop.step()
    loop.add(ask("long", range(30), max_tokens=2))
    plan = loop.schedule()
    assert plan is not None
    assert [step.count for step in plan.steps] == [1, 1, 1, 5]


def test_eos_ends_with_stop_and_is_part_of_the_tokens() -> None:
    loop = EngineLoop(CONFIG, script=counting)
    loop.add(ask("a", [5], max_tokens=20))
    loop.run()
    assert loop.tokens("a") == [6, 7, 8, 9]
    assert (loop.chunks[-1].finish, loop.chunks[-1].stop_token) == (Finish.STOP, EOS)


@pytest.mark.parametrize(
    ("sampling", "tokens", "finish"),
    [
        ({"ignore_eos": True, "max_tokens": 6}, 6, Finish.LENGTH),
        ({"min_tokens": 4, "max_tokens": 6}, 6, Finish.LENGTH),
        ({"min_tokens": 3, "max_tokens": 6}, 4, Finish.STOP),
        ({"stop_token_ids": (7,)}, 2, Finish.STOP),
        ({"ignore_eos": True, "stop_token_ids": (12,), "max_tokens": 20}, 7, Finish.STOP),
        ({"max_tokens": 4}, 4, Finish.STOP),
        ({"ignore_eos": True, "max_tokens": 1000}, 63, Finish.LENGTH),
    ],
)
def test_how_a_choice_ends(sampling: dict[str, object], tokens: int, finish: Finish) -> None:
    loop = EngineLoop(CONFIG, script=counting)
    loop.add(ask("a", [5], **sampling))
    loop.run()
    assert (len(loop.tokens("a")), loop.finish("a")) == (tokens, finish)


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (ask("a", []), "empty"),
        (ask("a", range(64)), "context"),
        (ask("a", [1], n=0), "at least 1"),
        (ask("a", [1], max_tokens=0), "at least 1"),
        (ask("a", [1], generated=((1,), (2,))), "resumed"),
        (ask("a", [1], max_tokens=2, generated=((1, 2),)), "has ended before"),
        (replace(ask("a", [1], n=2), over=(0, 1)), "over"),
        (replace(ask("a", [1], n=2), over=(2,)), "over"),
        (replace(ask("a", [1], n=3), over=(1, 1)), "over"),
    ],
)
def test_what_can_never_run_is_refused(request_: object, word: str) -> None:
    outcome = Engine(CONFIG).add(request_, 0)  # type: ignore[arg-type]
    assert isinstance(outcome, Refused) and word in outcome.reason


def test_the_pool_bounds_a_request_to_the_last_block() -> None:
    config = replace(CONFIG, num_blocks=4)
    assert isinstance(Engine(config).add(ask("a", range(10), max_tokens=8), 0), Refused)
    loop = EngineLoop(config)
    loop.add(ask("a", range(10), max_tokens=7, ignore_eos=True))
    loop.run()
    assert len(loop.tokens("a")) == 7


def test_a_known_id_is_refused_and_free_again_at_the_end() -> None:
    loop = EngineLoop(CONFIG)
    loop.add(ask("a", [1]))
    assert isinstance(loop.engine.add(ask("a", [1]), 0), Refused)
    loop.run()
    assert isinstance(loop.engine.add(ask("a", [1]), 0), Accepted)


def test_a_shared_prefix_is_found_but_its_last_token_is_computed() -> None:
    loop = EngineLoop(CONFIG)
    loop.add(ask("first", range(16), max_tokens=8, ignore_eos=True))
    loop.run()
    loop.add(ask("same", range(16)))
    loop.run()
    again = [*range(16), *loop.tokens("first")]  # what was generated is cached as well
    loop.add(ask("again", again[:21]))
    loop.run()
    cached = {c.request_id: c.cached_tokens for c in loop.chunks if c.cached_tokens is not None}
    assert cached == {"first": 0, "same": 12, "again": 20}
    snapshot = loop.snapshot()
    assert (snapshot.prefix_queries_total, snapshot.prefix_hits_total) == (53, 32)


def test_a_request_says_once_when_its_first_step_was_planned() -> None:
    loop = EngineLoop(replace(CONFIG, max_sequences=1))
    loop.add(ask("a", range(5), max_tokens=3, ignore_eos=True))
    loop.add(ask("b", range(5, 10), n=2, max_tokens=3, ignore_eos=True, arrival=1))
    loop.run()
    begun = [(one.request_id, one.begun) for one in loop.chunks if one.begun is not None]
    assert begun == [("a", 1), ("b", 4), ("b", 4)], "b waited for its place; its choices as one"


def test_another_tenant_finds_nothing() -> None:
    loop = EngineLoop(CONFIG)
    loop.add(ask("a", range(16)))
    loop.run()
    for salt in ({"tenant": "x"}, {"adapter": "x"}, {"model_version": "x"}):
        request = replace(ask(str(salt), range(16)), **salt)  # type: ignore[arg-type]
        loop.add(request)
        loop.run()
    assert loop.snapshot().prefix_hits_total == 0


def test_choices_fork_from_one_prompt_with_copy_on_write() -> None:
    loop = EngineLoop(CONFIG)
    loop.add(ask("a", range(10), n=3, max_tokens=4, ignore_eos=True, seed=3))
    loop.run()
    assert loop.snapshot().prompt_tokens_total == 10 + 2  # each other choice: the last token
    copies = [copy for plan in loop.plans for copy in plan.copies]
    assert [copy.kind for copy in copies] == [CopyKind.DEVICE] * 2  # the last one writes in place
    assert len({tuple(loop.tokens("a", choice)) for choice in range(3)}) == 3
    first = [chunk for chunk in loop.chunks if chunk.position == 0]
    assert [chunk.cached_tokens for chunk in first] == [0, 0, 0]


def test_a_block_is_saved_before_it_is_given_away_in_the_same_plan() -> None:
    loop = EngineLoop(replace(CONFIG, num_blocks=7))
    loop.add(ask("a", range(10), n=3, max_tokens=4, ignore_eos=True))
    loop.add(ask("young", range(20, 31), max_tokens=4, ignore_eos=True, arrival=1))
    loop.run()
    copies = next(
        p.copies for p in loop.plans if any(c.kind == CopyKind.SWAP_OUT for c in p.copies)
    )
    kinds = [copy.kind for copy in copies]
    saved = {c.source: i for i, c in enumerate(copies) if c.kind is CopyKind.SWAP_OUT}
    given = {c.target: i for i, c in enumerate(copies) if c.kind is CopyKind.DEVICE}
    assert kinds.count(CopyKind.DEVICE) == 2 and len(saved) == 3
    both = saved.keys() & given.keys()
    assert both and all(saved[block] < given[block] for block in both)


def test_more_choices_than_places_run_one_after_the_other() -> None:
    loop = EngineLoop(replace(CONFIG, max_sequences=2))
    loop.add(ask("a", range(10), n=5, max_tokens=4))
    loop.run()
    assert all(loop.finish("a", choice) for choice in range(5))
    assert loop.snapshot().prefix_queries_total == 10  # counted once


def test_prompt_logprobs_survive_a_recomputation() -> None:
    never_swap = PreemptionCosts(swap_ns_per_block=10**12)
    config = replace(CONFIG, num_blocks=12, step_tokens=8, preemption=never_swap)
    loop = EngineLoop(config)
    loop.add(ask("urgent", range(30, 50), max_tokens=20, arrival=0, ignore_eos=True))
    for _ in range(4):
        loop.step()
    loop.add(ask("a", range(20), max_tokens=4, arrival=1, prompt_logprobs=1))
    for _ in range(3):
        loop.step()
    loop.add(ask("b", range(20), max_tokens=4, arrival=2, prompt_logprobs=0, priority=-1))
    loop.run()
    assert loop.snapshot().preemptions_total > 0
    for name in ("a", "b"):
        first = next(chunk for chunk in loop.chunks if chunk.request_id == name)
        assert first.prompt_logprobs is not None
        found = [entry and entry.token for entry in first.prompt_logprobs]
        assert found == [None, *range(1, 20)]


def test_the_youngest_is_swapped_and_comes_back_under_a_new_epoch() -> None:
    loop = EngineLoop(replace(CONFIG, num_blocks=10))
    loop.add(ask("old", range(14), max_tokens=20, arrival=0, ignore_eos=True))
    loop.step()
    loop.add(ask("young", range(50, 60), max_tokens=20, arrival=1, ignore_eos=True))
    loop.run()
    swapped = [plan for plan in loop.plans if any(c.kind == CopyKind.SWAP_OUT for c in plan.copies)]
    assert len(swapped) == 1 and swapped[0].drops == (1,)
    epochs = [(s.sequence, s.epoch) for plan in loop.plans for s in plan.starts]
    assert epochs == [(0, 0), (1, 0), (1, 1)]
    assert any(c.kind == CopyKind.SWAP_IN for plan in loop.plans for c in plan.copies)
    snapshot = loop.snapshot()
    assert (snapshot.preemptions_total, snapshot.swaps_total) == (1, 1)
    assert snapshot.prompt_tokens_total == 24, "nothing was computed twice"


def test_swapped_sequences_are_counted_and_freed_by_an_abort() -> None:
    loop = EngineLoop(replace(CONFIG, num_blocks=10, prefix_cache=False))
    loop.add(ask("old", range(14), max_tokens=20, arrival=0, ignore_eos=True))
    loop.step()
    loop.add(ask("young", range(50, 60), max_tokens=20, arrival=1, ignore_eos=True))
    while not loop.snapshot().swapped:
        loop.step()
    assert loop.snapshot().host_blocks_free < 32
    loop.engine.abort("young")
    assert loop.snapshot().host_blocks_free == 32
    loop.run()


def test_a_better_priority_takes_a_place_and_an_equal_one_waits() -> None:
    loop = EngineLoop(replace(CONFIG, max_sequences=1))
    loop.add(ask("slow", range(4), max_tokens=10, ignore_eos=True, arrival=5))
    loop.step()
    loop.add(ask("earlier", range(4), max_tokens=1, arrival=1))
    loop.step()
    assert loop.snapshot().preemptions_total == 0, "an equal priority waits"
    loop.add(ask("urgent", range(4), max_tokens=1, priority=-1, arrival=9))
    loop.step()
    assert loop.finish("urgent") is Finish.LENGTH
    assert loop.snapshot().preemptions_total == 1


def test_nobody_is_preempted_when_that_would_not_make_room() -> None:
    """The urgent one finds its first blocks in the victim's table: freeing those gains nothing."""
    loop = EngineLoop(replace(CONFIG, num_blocks=8))
    loop.add(ask("peer", range(40, 52), max_tokens=5, ignore_eos=True, priority=-1))
    loop.add(ask("victim", range(12), max_tokens=5, ignore_eos=True, arrival=1))
    loop.step()
    loop.add(ask("urgent", range(19), max_tokens=1, priority=-1, arrival=2))
    loop.step()
    assert loop.snapshot().preemptions_total == 0
    loop.run()
    assert loop.finish("urgent") is Finish.LENGTH


def test_an_abort_in_flight_frees_blocks_when_the_plan_commits() -> None:
    loop = EngineLoop(CONFIG)
    loop.add(ask("a", range(10)), ask("b", range(20, 24), arrival=1))
    plan = loop.schedule()
    assert plan is not None
    used = 32 - loop.snapshot().blocks_free
    chunks = loop.engine.abort("a")
    assert [(c.finish, c.tokens, c.position) for c in chunks] == [(Finish.ABORT, (), 0)]
    assert 32 - loop.snapshot().blocks_free == used, "the plan in flight still names them"
    assert [chunk.request_id for chunk in loop.commit()] == ["b"]
    assert 32 - loop.snapshot().blocks_free == 1
    following = loop.schedule()
    assert following is not None and following.drops == (0,)
    assert loop.engine.abort("a") == [] == loop.engine.abort("nobody")


def test_aborting_the_choice_that_computes_the_prompt_leaves_the_others() -> None:
    loop = EngineLoop(replace(CONFIG, step_tokens=8))
    loop.add(ask("a", range(20), n=3, max_tokens=3, ignore_eos=True))
    loop.step()
    assert [chunk.choice for chunk in loop.engine.abort("a", 0)] == [0]
    loop.run()
    assert [len(loop.tokens("a", choice)) for choice in range(3)] == [0, 3, 3]


def test_a_resumed_request_goes_on_where_it_was() -> None:
    whole = EngineLoop(CONFIG)
    whole.add(ask("a", range(10), n=2, max_tokens=12, ignore_eos=True))
    whole.run()
    full = [whole.tokens("a", choice) for choice in range(2)]
    loop = EngineLoop(CONFIG)
    sent = (tuple(full[0][:5]), tuple(full[1]))  # the second choice was complete
    request = ask("a", range(10), n=2, max_tokens=12, ignore_eos=True, generated=sent)
    loop.add(replace(request, over=(1,)))
    loop.run()
    assert loop.tokens("a", 0) == full[0][5:]
    assert loop.chunks[0].position == 5
    assert {chunk.choice for chunk in loop.chunks} == {0}


def test_plans_commit_in_order() -> None:
    loop = EngineLoop(CONFIG)
    loop.add(ask("a", range(4)), ask("b", range(4, 8)))
    plan = loop.schedule()
    assert plan is not None
    with pytest.raises(ValueError, match="next one to commit"):
        loop.engine.commit(replace(plan, plan_id=7), StepResult(plan_id=7, samples=()), 0)
    assert [chunk.request_id for chunk in loop.commit()] == ["a", "b"], "and nothing was lost"
    with pytest.raises(ValueError, match="no plan is in flight"):
        loop.engine.commit(plan, StepResult(plan_id=plan.plan_id, samples=()), 0)


@pytest.mark.parametrize(
    ("swap_ns", "recompute_ns", "swaps"),
    [(100, 1, 0), (1, 100, 1), (23, 14, 1), (24, 14, 0)],
)
def test_a_victim_comes_back_the_cheaper_way(swap_ns: int, recompute_ns: int, swaps: int) -> None:
    """Three blocks there and back, or ten tokens: 6 * swap_ns against 10 * recompute_ns."""
    costs = PreemptionCosts(swap_ns_per_block=swap_ns, recompute_ns_per_token=recompute_ns)
    loop = EngineLoop(replace(CONFIG, max_sequences=1, preemption=costs))
    loop.add(ask("slow", range(10), max_tokens=5, ignore_eos=True))
    loop.step()
    loop.add(ask("urgent", range(20, 24), max_tokens=1, priority=-1))
    loop.step()
    snapshot = loop.snapshot()
    assert (snapshot.preemptions_total, snapshot.swaps_total) == (1, swaps)
    loop.run()


def test_what_others_keep_need_not_be_computed_again() -> None:
    """The same prices, but two of the victim's three blocks stay cached for its sibling: two
    tokens are cheaper than six copies."""
    costs = PreemptionCosts(swap_ns_per_block=10, recompute_ns_per_token=10)
    loop = EngineLoop(replace(CONFIG, max_sequences=2, preemption=costs))
    loop.add(ask("old", range(10), max_tokens=9, ignore_eos=True))
    loop.step()
    loop.add(ask("young", range(10), max_tokens=9, ignore_eos=True, arrival=1))
    loop.step()
    loop.add(ask("urgent", range(20, 24), max_tokens=1, priority=-1))
    loop.step()
    snapshot = loop.snapshot()
    assert (snapshot.preemptions_total, snapshot.swaps_total) == (1, 0)
    loop.run()


def test_two_hundred_requests_aborted_anywhere_leave_nothing() -> None:
    loop = EngineLoop(replace(CONFIG, num_blocks=20, num_host_blocks=12), depth=2)
    for number in range(200):
        loop.add(ask(f"r{number}", range(number % 23 + 1), max_tokens=30, n=number % 3 + 1))
        loop.step()
        if number >= 10:
            loop.engine.abort(f"r{number - 10 * (number % 2)}")
    for number in range(200):
        loop.engine.abort(f"r{number}")
    loop.run()
    snapshot = loop.snapshot()
    assert (snapshot.running, snapshot.waiting, snapshot.swapped) == (0, 0, 0)
    assert snapshot.blocks_free == 20 and snapshot.host_blocks_free == 12
    assert snapshot.finished_total + snapshot.aborted_total == sum(i % 3 + 1 for i in range(200))


@pytest.mark.parametrize(("stages", "rows"), [(1, [12]), (2, [6] * 2), (3, [4] * 3), (4, [3] * 4)])
def test_stages_of_a_pipeline_share_the_sequences(stages: int, rows: list[int]) -> None:
    """With all of them in one plan the other stages would have nothing to do."""
    config = replace(CONFIG, num_blocks=200, max_sequences=12, micro_batches=stages)
    loop = EngineLoop(config, depth=stages)
    for number in range(12):
        loop.add(ask(f"r{number}", range(number, number + 5), max_tokens=50, ignore_eos=True))
    for _ in range(40):
        loop.step()
    assert [len(plan.steps) for plan in loop.plans[-len(rows) :]] == rows
    named = [step.sequence for plan in loop.plans[-len(rows) :] for step in plan.steps]
    assert len(set(named)) == 12, "everybody has a turn"
    loop.run()
    assert len(loop.everything()) == 12


def test_who_waits_for_kv_is_seen() -> None:
    """Its prompt is computed elsewhere, so one token is left; nothing is to be done for it yet."""
    engine = Engine(CONFIG)
    request = ask("a", range(40), max_tokens=3)
    assert engine.reserve(request, 1)
    assert engine.snapshot("r", 1).waiting == 0
    assert isinstance(engine.add(replace(request, generated=((7,),)), 1), Accepted)
    seen = engine.snapshot("r", 2)
    assert (seen.waiting, seen.waiting_tokens, sum(seen.sequences_by_tier)) == (1, 1, 1)
    assert seen.output_tokens_left == 2
    assert not engine.has_work
    assert engine.give_up("a")
    assert engine.snapshot("r", 3).waiting_tokens == 41, "now all of it is computed here"
