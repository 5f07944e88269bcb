"""The worker's memory of sequences, over whatever plans an engine makes: deltas add up.

The truth is the scripted worker's, which every plan has passed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kit.engine_loop import EngineLoop, ask

from fabric.core.configs import EngineConfig
from fabric.core.engine.plan import Previous, StepPlan
from fabric.worker.batch import BatchBuilder, SequenceTable, Span
from fabric.worker.sampler import SamplingState

CONFIG = EngineConfig(block_size=4, max_sequences=4, step_tokens=20, context_limit=64)


class Follower:
    """A table and a builder that see every plan of an engine; `places` is too few now and then."""

    def __init__(self, config: EngineConfig, places: int) -> None:
        self.table = SequenceTable(
            max_sequences=places, context_limit=config.context_limit, block_size=config.block_size
        )
        self.builder = BatchBuilder()

    def follow(self, plan: StepPlan, truth: dict[int, Any]) -> None:
        """Apply a plan as `Worker.execute` does; then what the batch says must be the truth."""
        for sequence in plan.drops:
            self.table.drop(sequence)
        for start in plan.starts:
            self.table.start(start, SamplingState(start, ()))
        states = [self.table.advance(step, unknown) for step in plan.steps]
        spans = [
            Span(state, step.start, step.count, int(step.samples))
            for state, step in zip(states, plan.steps, strict=True)
        ]
        batch = self.builder.build(spans, self.table.blocks_XB)
        assert len(self.table) == len(truth), "a sequence too many or too few is remembered"
        starts = batch.query_starts_S1.tolist()
        rows = batch.table_rows_S.tolist()
        assert len(set(rows)) == len(rows), "two sequences share a row"
        for index, step in enumerate(plan.steps):
            known = truth[step.sequence]
            inputs = batch.token_ids_T[starts[index] : starts[index + 1]].tolist()
            assert inputs == known.tokens[step.start : step.start + step.count], "other tokens"
            blocks = batch.block_tables_XB[rows[index], : len(known.blocks)].tolist()
            assert blocks == known.blocks, "other blocks"
            assert states[index].tokens == known.tokens, "another history"
        ends = [end - 1 for end, step in zip(starts[1:], plan.steps, strict=True) if step.samples]
        assert batch.logit_rows_R.tolist() == ends, "logits of other rows"
        assert batch.first_positions_S.tolist() == [step.start for step in plan.steps]


def unknown(_: Previous) -> int:
    raise AssertionError("these engines know every token")


crowds = st.lists(
    st.builds(
        dict,
        length=st.integers(1, 24),
        base=st.integers(0, 1),
        max_tokens=st.integers(1, 20),
        n=st.sampled_from([1, 1, 3]),
        priority=st.integers(0, 2),
        turns=st.integers(0, 6),  # before the next one comes
        aborted=st.booleans(),
    ),
    min_size=2,
    max_size=10,
)
limits = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(12, 24),
        "num_host_blocks": st.sampled_from([0, 30]),
        "chunk_tokens": st.integers(2, 20),
    }
)


def check(crowd: list[dict[str, Any]], limit: dict[str, int], places: int) -> None:
    config = replace(CONFIG, **limit)  # type: ignore[arg-type]
    loop = EngineLoop(config, checked=False)
    follower = Follower(config, places)

    def turn() -> None:
        seen = len(loop.plans)
        loop.step()
        for plan in loop.plans[seen:]:
            follower.follow(plan, loop.worker.known)

    for number, one in enumerate(crowd):
        prompt = range(one["base"], one["base"] + one["length"])
        sampling = {"max_tokens": one["max_tokens"], "n": one["n"]}
        loop.add(ask(f"r{number}", prompt, arrival=number, priority=one["priority"], **sampling))
        for _ in range(one["turns"]):
            turn()
        if one["aborted"]:
            loop.engine.abort(f"r{number}")
    for _ in range(1000):
        if not loop.engine.has_work:
            return
        turn()
    raise AssertionError("it never ends")


@given(crowd=crowds, limit=limits, places=st.sampled_from([1, 4]))
def test_deltas_add_up_to_the_truth(
    crowd: list[dict[str, Any]], limit: dict[str, int], places: int
) -> None:
    check(crowd, limit, places)


def without(field: str, nothing: object) -> Callable[[Any], Any]:
    """`advance` as if every step's `field` were empty."""
    return lambda original: (
        lambda self, step, resolve: original(self, replace(step, **{field: nothing}), resolve)
    )


def forgotten(_: Any) -> Any:
    """A drop does nothing."""
    return lambda _self, _sequence: None


def cleared(original: Any) -> Any:
    """A table that grows loses what it held."""

    def grow(self: SequenceTable, rows: int) -> None:
        original(self, rows)
        self.blocks_XB.zero_()

    return grow


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("advance", without("replace", None)),
        ("advance", without("blocks", ())),
        ("drop", forgotten),
        ("_grow", cleared),
    ],
    ids=["copy-on-write", "new blocks", "drop", "grow"],
)
def test_a_planted_bug_is_found(method: str, wrong: Callable[[Any], Any]) -> None:
    search = settings(
        max_examples=200,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    with planted(method, wrong), pytest.raises(AssertionError):
        search(given(crowd=crowds, limit=limits, places=st.sampled_from([1, 4]))(check))()


@contextmanager
def planted(method: str, wrong: Callable[[Any], Any]) -> Iterator[None]:
    """The table's method is wrong meanwhile."""
    original = getattr(SequenceTable, method)
    setattr(SequenceTable, method, wrong(original))
    try:
        yield
    finally:
        setattr(SequenceTable, method, original)
