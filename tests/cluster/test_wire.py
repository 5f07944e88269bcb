"""What is sent is what arrives."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.cluster.reports import (
    DispatcherReport,
    HistogramReport,
    ReplicaReport,
    ShardReport,
    decode_dispatcher,
    decode_replica,
    encode_dispatcher,
    encode_replica,
)
from fabric.cluster.wire import decode_request, decode_step, encode_request, encode_step
from fabric.core.request import Finish, Request, SamplingParams, TokenChunk, TokenLogprobs
from fabric.core.snapshot import ReplicaSnapshot

tokens = st.lists(st.integers(0, 1 << 20), max_size=5).map(tuple)
numbers = st.integers(0, 1 << 63)
floats = st.floats(allow_nan=False)
sampling = st.builds(
    SamplingParams,
    max_tokens=numbers,
    temperature=floats,
    seed=st.integers(0, (1 << 64) - 1),
    top_k=st.none() | numbers,
    logit_bias=st.lists(st.tuples(numbers, floats), max_size=3).map(tuple),
    logprobs=st.none() | numbers,
    stop_token_ids=tokens,
)
requests = st.builds(
    Request,
    request_id=st.text(),
    prompt=tokens,
    sampling=sampling,
    arrival=numbers,
    adapter=st.none() | st.text(),
    deadline=st.none() | numbers,
    generated=st.lists(tokens, max_size=3).map(tuple),
    over=tokens,
)
logprobs = st.builds(
    TokenLogprobs,
    token=numbers,
    logprob=floats | st.just(-math.inf),
    rank=numbers,
    top=st.lists(st.tuples(numbers, floats), max_size=3).map(tuple),
)
chunks = st.builds(
    TokenChunk,
    request_id=st.text(),
    choice=numbers,
    position=numbers,
    tokens=tokens,
    finish=st.none() | st.sampled_from(Finish),
    stop_token=st.none() | numbers,
    logprobs=st.none() | st.lists(logprobs, max_size=2).map(tuple),
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=3).map(tuple),
    cached_tokens=st.none() | numbers,
    begun=st.none() | numbers,
)
snapshots = st.builds(ReplicaSnapshot, replica_id=st.text(), taken=numbers, running=numbers)
fronts = st.builds(
    DispatcherReport,
    dispatcher_id=st.text(),
    queued_requests=numbers,
    series=st.lists(st.tuples(st.text(), floats), max_size=2).map(tuple),
)
shards = st.builds(
    ShardReport,
    tp_rank=numbers,
    node=st.text(),
    weight_bytes=numbers,
    expert_loads=tokens,
)
reports = st.builds(
    ReplicaReport,
    snapshot=snapshots,
    error=st.none() | st.text(),
    stuck_s=floats,
    prompt_tokens_per_s=floats,
    generated_tokens_per_s=floats,
    histograms=st.lists(st.builds(HistogramReport, counts=tokens, total=floats), max_size=2).map(
        tuple
    ),
    finished=st.lists(st.tuples(st.text(), numbers), max_size=2).map(tuple),
    dispatchers=st.lists(fronts, max_size=2).map(tuple),
    shards=st.lists(shards, max_size=2).map(tuple),
)


@settings(max_examples=40)
@given(requests)
def test_requests(one: Request) -> None:
    assert decode_request(encode_request(one)) == one


@settings(max_examples=40)
@given(snapshots, st.lists(chunks, max_size=4))
def test_steps(snapshot: ReplicaSnapshot, some: list[TokenChunk]) -> None:
    item = decode_step(encode_step(snapshot, some))
    assert item.snapshot == snapshot
    assert list(item.chunks) == some
    assert all(type(chunk.finish) in (Finish, type(None)) for chunk in item.chunks)


@settings(max_examples=40)
@given(fronts)
def test_dispatcher_reports(one: DispatcherReport) -> None:
    assert decode_dispatcher(encode_dispatcher(one)) == one


@settings(max_examples=40)
@given(reports)
def test_replica_reports(one: ReplicaReport) -> None:
    assert decode_replica(encode_replica(one)) == one
