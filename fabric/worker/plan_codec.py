"""`StepPlan` and `StepResult` as bytes, for workers in other processes.

The format is `marshal` of plain tuples: one C call for a whole step, floats come back bit for bit,
and reading it can build nothing but tuples, numbers and strings. Both ends run the same Python.
"""

from __future__ import annotations

import marshal
from dataclasses import fields
from typing import Any

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

_SAMPLING = tuple(field.name for field in fields(SamplingParams))


def encode_plan(plan: StepPlan) -> bytes:
    """A `StepPlan` as bytes: 20 to 30 of them for a sequence that decodes."""
    return marshal.dumps(
        (
            plan.plan_id,
            [_step_row(step) for step in plan.steps],
            [_start_row(start) for start in plan.starts],
            [(int(copy.kind), copy.source, copy.target) for copy in plan.copies],
            plan.drops,
        )
    )


def decode_plan(data: bytes) -> StepPlan:
    """The inverse of `encode_plan`."""
    plan_id, steps, starts, copies, drops = marshal.loads(data)
    return StepPlan(
        plan_id=plan_id,
        steps=tuple([_step(row) for row in steps]),
        starts=tuple([_start(row) for row in starts]),
        copies=tuple([BlockCopy(kind=CopyKind(kind), source=s, target=t) for kind, s, t in copies]),
        drops=drops,
    )


def encode_result(result: StepResult) -> bytes:
    """A `StepResult` as bytes."""
    return marshal.dumps((result.plan_id, [_sample_row(one) for one in result.samples]))


def decode_result(data: bytes) -> StepResult:
    """The inverse of `encode_result`."""
    plan_id, samples = marshal.loads(data)
    return StepResult(plan_id=plan_id, samples=tuple([_sample(row) for row in samples]))


def _step_row(step: SequenceStep) -> Any:
    tokens: Any = step.tokens
    for token in tokens:
        if isinstance(token, Previous):
            tokens = [_token_row(token) for token in tokens]
            break
    return (
        step.sequence,
        step.epoch,
        step.start,
        step.count,
        step.samples,
        tokens,
        step.blocks,
        step.replace,
    )


def _step(row: Any) -> SequenceStep:
    sequence, epoch, start, count, samples, tokens, blocks, replace = row
    if isinstance(tokens, list):
        tokens = tuple([_token(token) for token in tokens])
    return SequenceStep(
        sequence=sequence,
        epoch=epoch,
        start=start,
        count=count,
        samples=samples,
        tokens=tokens,
        blocks=blocks,
        replace=replace,
    )


def _token_row(token: int | Previous) -> Any:
    return (token.plan_id, token.row) if isinstance(token, Previous) else token


def _token(row: Any) -> int | Previous:
    if isinstance(row, tuple):
        plan_id, index = row
        return Previous(plan_id=plan_id, row=index)
    token: int = row
    return token


def _start_row(start: SequenceStart) -> Any:
    return (
        start.sequence,
        start.epoch,
        start.choice,
        start.tokens,
        start.prompt_length,
        start.blocks,
        tuple(getattr(start.sampling, name) for name in _SAMPLING),
        start.adapter,
    )


def _start(row: Any) -> SequenceStart:
    sequence, epoch, choice, tokens, prompt_length, blocks, sampling, adapter = row
    return SequenceStart(
        sequence=sequence,
        epoch=epoch,
        choice=choice,
        tokens=tokens,
        prompt_length=prompt_length,
        blocks=blocks,
        sampling=SamplingParams(**dict(zip(_SAMPLING, sampling, strict=True))),
        adapter=adapter,
    )


def _sample_row(sample: Sample) -> Any:
    if sample.logprobs is None and not sample.prompt_logprobs:
        return sample.token
    return (
        sample.token,
        None if sample.logprobs is None else _logprobs_row(sample.logprobs),
        [_logprobs_row(one) for one in sample.prompt_logprobs],
    )


def _sample(row: Any) -> Sample:
    if not isinstance(row, tuple):
        return Sample(token=row)
    token, logprobs, prompt = row
    return Sample(
        token=token,
        logprobs=None if logprobs is None else _logprobs(logprobs),
        prompt_logprobs=tuple([_logprobs(one) for one in prompt]),
    )


def _logprobs_row(one: TokenLogprobs) -> Any:
    return (one.token, one.logprob, one.rank, one.top)


def _logprobs(row: Any) -> TokenLogprobs:
    token, logprob, rank, top = row
    return TokenLogprobs(token=token, logprob=logprob, rank=rank, top=top)
