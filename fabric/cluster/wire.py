"""What travels between dispatcher and replica, as bytes: requests down, one item a step back.

The format is `marshal` of plain tuples: one C call for a whole step, floats come back bit for bit,
and reading it can build nothing but tuples, numbers and strings. Both ends run the same Python:
Ray refuses anything else.
"""

from __future__ import annotations

import marshal
from dataclasses import dataclass, fields
from typing import Any

from fabric.core.request import Finish, Request, SamplingParams, TokenChunk, TokenLogprobs
from fabric.core.snapshot import ReplicaSnapshot

_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_REQUEST = tuple(field.name for field in fields(Request))
_SAMPLING_AT = _REQUEST.index("sampling")
_SNAPSHOT = tuple(field.name for field in fields(ReplicaSnapshot))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepItem:
    """One step as one dispatcher sees it: the replica's state, and its own requests' new tokens."""

    snapshot: ReplicaSnapshot
    chunks: tuple[TokenChunk, ...]


def encode_request(request: Request) -> bytes:
    """`Request` as bytes."""
    sampling = tuple(getattr(request.sampling, name) for name in _SAMPLING)
    row = tuple(getattr(request, name) for name in _REQUEST)
    return marshal.dumps((row[:_SAMPLING_AT], sampling, row[_SAMPLING_AT + 1 :]))


def decode_request(data: bytes) -> Request:
    """The inverse of `encode_request`."""
    before, sampling, after = marshal.loads(data)
    params = SamplingParams(**dict(zip(_SAMPLING, sampling, strict=True)))
    return Request(**dict(zip(_REQUEST, (*before, params, *after), strict=True)))


def encode_step(snapshot: ReplicaSnapshot, chunks: list[TokenChunk]) -> bytes:
    """One stream item."""
    return marshal.dumps((snapshot_row(snapshot), [_chunk_row(chunk) for chunk in chunks]))


def decode_step(data: bytes) -> StepItem:
    """The inverse of `encode_step`."""
    snapshot, chunks = marshal.loads(data)
    return StepItem(
        snapshot=snapshot_from_row(snapshot), chunks=tuple(_chunk(row) for row in chunks)
    )


def snapshot_row(snapshot: ReplicaSnapshot) -> Any:
    """A snapshot's values in the order of its fields."""
    return tuple(getattr(snapshot, name) for name in _SNAPSHOT)


def snapshot_from_row(row: tuple[object, ...]) -> ReplicaSnapshot:
    """A snapshot from its values in the order of its fields."""
    return ReplicaSnapshot(**dict(zip(_SNAPSHOT, row, strict=True)))  # type: ignore[arg-type]


def _chunk_row(chunk: TokenChunk) -> Any:
    return (
        chunk.request_id,
        chunk.choice,
        chunk.position,
        chunk.tokens,
        None if chunk.finish is None else chunk.finish.value,
        chunk.stop_token,
        None if chunk.logprobs is None else tuple(_logprobs_row(one) for one in chunk.logprobs),
        None
        if chunk.prompt_logprobs is None
        else tuple(None if one is None else _logprobs_row(one) for one in chunk.prompt_logprobs),
        chunk.cached_tokens,
        chunk.begun,
    )


def _chunk(row: Any) -> TokenChunk:
    request_id, choice, position, tokens, finish, stop_token, logprobs, prompt, cached, begun = row
    return TokenChunk(
        request_id=request_id,
        choice=choice,
        position=position,
        tokens=tokens,
        finish=None if finish is None else Finish(finish),
        stop_token=stop_token,
        logprobs=None if logprobs is None else tuple(_logprobs(one) for one in logprobs),
        prompt_logprobs=None
        if prompt is None
        else tuple(None if one is None else _logprobs(one) for one in prompt),
        cached_tokens=cached,
        begun=begun,
    )


def _logprobs_row(one: TokenLogprobs) -> Any:
    return (one.token, one.logprob, one.rank, one.top)


def _logprobs(row: Any) -> TokenLogprobs:
    token, logprob, rank, top = row
    return TokenLogprobs(token=token, logprob=logprob, rank=rank, top=top)
