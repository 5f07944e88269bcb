"""A worker's life on a channel: what comes back is what `execute` would have returned."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from fabric.core.engine.plan import SequenceStart, SequenceStep, StepPlan
from fabric.core.request import SamplingParams
from fabric.worker.channel import Channel, ChannelClosed
from fabric.worker.member import run_plans
from fabric.worker.plan_codec import decode_result, encode_plan
from fabric.worker.plan_ring import RingChannel
from fabric.worker.plan_socket import Doorman
from fabric.worker.worker import Worker

PROMPT = (5, 6, 7)


@contextmanager
def running(worker: Worker, kind: str) -> Iterator[tuple[Channel, Future[None]]]:
    """`run_plans` in a thread, at the other end of a channel."""
    end = RingChannel.create() if kind == "ring" else Doorman("127.0.0.1")
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(run_plans, worker, end.address)
        channel = end if isinstance(end, RingChannel) else end.welcome(30.0)
        try:
            yield channel, ended
        finally:
            channel.close()


def plans() -> tuple[StepPlan, StepPlan]:
    start = SequenceStart(
        sequence=1,
        epoch=0,
        choice=0,
        tokens=PROMPT,
        prompt_length=len(PROMPT),
        blocks=(1,),
        sampling=SamplingParams(max_tokens=4, temperature=0.0, logprobs=2),
    )
    prefill = SequenceStep(sequence=1, epoch=0, start=0, count=3, samples=True)
    decode = SequenceStep(sequence=1, epoch=0, start=3, count=1, samples=True, tokens=(9,))
    return (
        StepPlan(plan_id=0, steps=(prefill,), starts=(start,)),
        StepPlan(plan_id=1, steps=(decode,)),
    )


@pytest.fixture
def worker(tiny_worker: Worker) -> Worker:
    tiny_worker.allocate(
        num_blocks=8, num_host_blocks=0, block_size=16, max_sequences=2, context_limit=48
    )
    return tiny_worker


@pytest.mark.parametrize("kind", ["ring", "socket"])
def test_results_are_those_of_execute(worker: Worker, kind: str) -> None:
    expected = [worker.execute(plan) for plan in plans()]
    worker.execute(StepPlan(plan_id=2, steps=(), drops=(1,)))
    with running(worker, kind) as (channel, ended):
        for plan in plans():  # both under way, as in a pipeline
            channel.send(encode_plan(plan), 30.0)
        assert [decode_result(channel.receive(30.0)) for _ in plans()] == expected
        channel.close()
        ended.result(timeout=30)


@pytest.mark.parametrize("kind", ["ring", "socket"])
def test_a_step_that_raises_closes_the_channel_and_says_why(worker: Worker, kind: str) -> None:
    with running(worker, kind) as (channel, ended):
        channel.send(encode_plan(plans()[1]), 30.0)  # of a sequence that it doesn't know
        with pytest.raises(ChannelClosed):
            channel.receive(30.0)
        with pytest.raises(Exception, match="not known"):
            ended.result(timeout=30)
