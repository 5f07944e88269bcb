"""The response reader and the token trace: any split of the bytes reads the same."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.bench.wire import ResponseReader, TokenTrace, WireError, error_message

TEXT = {
    "choices": [{"index": 0, "text": ' say "usage": {1} or "error": now', "finish_reason": None}]
}
LAST = {"choices": [{"index": 0, "text": " end", "finish_reason": "length"}]}
USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 9,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4},
    },
}


def sse(*events: object, end: str = "\n\n") -> bytes:
    words = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {word}{end}" for word in words).encode()


def in_chunks(body: bytes, sizes: list[int]) -> bytes:
    parts, rest = [], body
    for size in sizes:
        part, rest = rest[:size], rest[size:]
        if part:
            parts.append(b"%x\r\n%s\r\n" % (len(part), part))
    parts += [b"%X;last=yes\r\n%s\r\n" % (len(rest), rest)] if rest else []
    return b"".join(parts) + b"0\r\n\r\n"


def feed(wire: bytes, cuts: list[int]) -> tuple[ResponseReader, bytes]:
    reader, body = ResponseReader(), b""
    for start, end in pairwise([0, *sorted({c % (len(wire) + 1) for c in cuts}), len(wire)]):
        body += reader.feed(wire[start:end])
    return reader, body


@given(
    body=st.binary(max_size=300),
    sizes=st.lists(st.integers(1, 60), max_size=6),
    cuts=st.lists(st.integers(0, 600), max_size=12),
)
def test_chunked_body_whatever_the_split(body: bytes, sizes: list[int], cuts: list[int]) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX: y\r\n\r\n"
    reader, got = feed(head + in_chunks(body, sizes), cuts)
    assert (reader.status, got, reader.done, reader.reusable) == (200, body, True, True)


@given(body=st.binary(max_size=200), cuts=st.lists(st.integers(0, 300), max_size=8))
def test_counted_body_whatever_the_split(body: bytes, cuts: list[int]) -> None:
    wire = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    reader, got = feed(wire, cuts)
    assert (reader.status, got, reader.done) == (404, body, True)


@given(body=st.binary(max_size=200), cuts=st.lists(st.integers(0, 300), max_size=8))
def test_body_to_the_end_of_the_connection(body: bytes, cuts: list[int]) -> None:
    reader, got = feed(b"HTTP/1.0 200 OK\r\n\r\n" + body, cuts)
    assert got == body
    assert not reader.done
    reader.end()
    assert reader.done
    assert not reader.reusable


@pytest.mark.parametrize(
    "wire",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
    ],
)
def test_what_is_no_response_is_refused(wire: bytes) -> None:
    with pytest.raises(WireError):
        ResponseReader().feed(wire)


def test_a_response_cut_short_is_an_error() -> None:
    reader = ResponseReader()
    reader.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab")
    with pytest.raises(WireError, match="middle"):
        reader.end()


def test_connection_close_is_obeyed() -> None:
    reader = ResponseReader()
    reader.feed(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    assert reader.done
    assert not reader.reusable


@given(cuts=st.lists(st.integers(0, 900), max_size=10), crlf=st.booleans())
def test_trace_counts_events_and_usage_whatever_the_split(cuts: list[int], crlf: bool) -> None:
    end = "\r\n\r\n" if crlf else "\n\n"
    stream = b": a comment\n\n" + sse(TEXT, TEXT, TEXT, LAST, USAGE, "[DONE]", end=end)
    trace = TokenTrace()
    places = [0, *sorted({c % (len(stream) + 1) for c in cuts}), len(stream)]
    for now, (start, stop) in enumerate(pairwise(places)):
        trace.feed(stream[start:stop], now)
    assert len(trace.times) == 4
    assert trace.times == sorted(trace.times)
    assert (trace.output_tokens, trace.prompt_tokens, trace.cached_tokens) == (7, 9, 4)
    assert trace.ended
    assert trace.error is None


def test_a_chat_stream_starts_with_its_first_word() -> None:
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    word = {"choices": [{"delta": {"content": "Hi"}, "finish_reason": None}]}
    stop = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    trace = TokenTrace()
    for now, event in enumerate((role, word, word, stop)):
        trace.feed(sse(event), now)
    assert trace.times == [1, 2]


def test_tokens_without_text_are_tokens() -> None:
    empty = {"choices": [{"index": 0, "text": "", "finish_reason": None}]}
    trace = TokenTrace()
    for now, event in enumerate((empty, TEXT, LAST)):
        trace.feed(sse(event), now)
    assert trace.times == [0, 1, 2]


def test_an_error_in_the_stream_is_seen_after_the_first_token_too() -> None:
    trace = TokenTrace()
    trace.feed(sse(TEXT, TEXT, {"error": {"message": "out of luck"}}), 1)
    assert trace.error == "out of luck"
    assert len(trace.times) == 2


def test_an_event_that_is_not_json_is_refused() -> None:
    with pytest.raises(WireError, match="JSON"):
        TokenTrace().feed(b"data: {oops\n\n", 0)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "a"}}, "a"),
        ({"error": "b"}, "b"),
        ({"detail": "c"}, "c"),
        (["d"], "['d']"),
    ],
)
def test_error_messages(body: object, said: str) -> None:
    assert error_message(body) == said
