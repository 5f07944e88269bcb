"""A plan that has travelled is the plan that was sent, and so is its result."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.engine.plan import (
    BlockCopy,
    CopyKind,
    Previous,
    Sample,
    SequenceStart,
    SequenceStep,
    StepPlan,
    StepResult,
)
from fabric.core.request import SamplingParams, TokenLogprobs
from fabric.worker.plan_codec import decode_plan, decode_result, encode_plan, encode_result

numbers = st.integers(-2, 1 << 40)
tokens = st.integers(0, 1 << 20)
many = st.lists(tokens, max_size=6).map(tuple)
floats = st.floats(allow_nan=False)
samplings = st.builds(
    SamplingParams,
    max_tokens=numbers,
    temperature=floats,
    seed=st.integers(0, (1 << 64) - 1),
    top_k=st.none() | numbers,
    logit_bias=st.lists(st.tuples(tokens, floats), max_size=3).map(tuple),
    logprobs=st.none() | numbers,
    stop_token_ids=many,
)
starts = st.builds(
    SequenceStart,
    sequence=numbers,
    epoch=numbers,
    choice=numbers,
    tokens=many,
    prompt_length=numbers,
    blocks=many,
    sampling=samplings,
    adapter=st.none() | st.text(),
)
steps = st.builds(
    SequenceStep,
    sequence=numbers,
    epoch=numbers,
    start=numbers,
    count=numbers,
    samples=st.booleans(),
    tokens=st.lists(tokens | st.builds(Previous, plan_id=numbers, row=numbers), max_size=4).map(
        tuple
    ),
    blocks=many,
    replace=st.none() | st.tuples(numbers, numbers),
)
copies = st.builds(BlockCopy, kind=st.sampled_from(CopyKind), source=numbers, target=numbers)
plans = st.builds(
    StepPlan,
    plan_id=numbers,
    steps=st.lists(steps, max_size=4).map(tuple),
    starts=st.lists(starts, max_size=2).map(tuple),
    copies=st.lists(copies, max_size=3).map(tuple),
    drops=many,
)
logprobs = st.builds(
    TokenLogprobs,
    token=tokens,
    logprob=floats | st.just(-math.inf),
    rank=numbers,
    top=st.lists(st.tuples(tokens, floats), max_size=3).map(tuple),
)
samples = st.builds(
    Sample,
    token=st.none() | tokens,
    logprobs=st.none() | logprobs,
    prompt_logprobs=st.lists(logprobs, max_size=3).map(tuple),
)
results = st.builds(StepResult, plan_id=numbers, samples=st.lists(samples, max_size=4).map(tuple))


@given(plan=plans)
def test_plans_arrive_as_they_were_sent(plan: StepPlan) -> None:
    arrived = decode_plan(encode_plan(plan))
    assert arrived == plan
    assert all(type(copy.kind) is CopyKind for copy in arrived.copies)


@given(result=results)
def test_results_arrive_as_they_were_sent(result: StepResult) -> None:
    assert decode_result(encode_result(result)) == result


def test_a_decoding_sequence_takes_few_bytes() -> None:
    """What a step costs on the way must not grow with what the sequence has behind it."""
    plan = StepPlan(
        plan_id=100_000,
        steps=tuple(
            SequenceStep(
                sequence=1_000 + row, epoch=3, start=30_000, count=1, samples=True, tokens=(row,)
            )
            for row in range(256)
        ),
    )
    assert len(encode_plan(plan)) <= 256 * 40


def test_a_cut_off_plan_is_no_plan() -> None:
    data = encode_plan(StepPlan(plan_id=1, steps=(), drops=(1, 2)))
    with pytest.raises((EOFError, ValueError)):
        decode_plan(data[:-3])
