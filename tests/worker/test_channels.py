"""Both channels: whatever is sent arrives, whole and in order, or both ends hear that it can't."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.source import ROOT

from fabric.worker import channel as channel_module
from fabric.worker.channel import Channel, ChannelClosed, Unframer, framed
from fabric.worker.plan_ring import RingChannel
from fabric.worker.plan_socket import Doorman, connect

Pair = tuple[Channel, Channel]


def rings(ring_bytes: int = 1 << 12) -> Pair:
    maker = RingChannel.create(ring_bytes)
    return maker, RingChannel.attach(maker.address)


def sockets() -> Pair:
    door = Doorman("127.0.0.1")
    with ThreadPoolExecutor(1) as thread:
        welcomed = thread.submit(door.welcome, 5.0)
        worker = connect(door.address, 5.0)
        return welcomed.result(), worker


both = pytest.mark.parametrize("pair", [rings, sockets])

# In another process: says "ready", then echoes whatever comes until the channel closes.
ECHO = """
import sys
from fabric.worker.channel import ChannelClosed
from fabric.worker.plan_ring import RingChannel
from fabric.worker.plan_socket import connect
address = sys.argv[1]
end = RingChannel.attach(address) if address.startswith("/proc") else connect(address, 5.0)
print("ready", flush=True)
try:
    while True:
        end.send(end.receive(None), 5.0)
except ChannelClosed:
    print("closed", flush=True)
"""


@contextmanager
def echo(kind: str) -> Iterator[tuple[Channel, subprocess.Popen[str]]]:
    """A process at the other end of a channel."""
    end = RingChannel.create() if kind == "ring" else Doorman("127.0.0.1")
    process = subprocess.Popen(
        [sys.executable, "-c", ECHO, end.address],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        channel = end if isinstance(end, RingChannel) else end.welcome(60.0)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield channel, process
    finally:
        process.kill()
        process.wait()


@settings(deadline=None, max_examples=60)
@given(
    ring_bits=st.integers(4, 9),
    sizes=st.lists(st.integers(0, 700), max_size=30),
    there_and_back=st.booleans(),
)
def test_a_ring_of_any_size_carries_messages_of_any_size(
    ring_bits: int, sizes: list[int], there_and_back: bool
) -> None:
    """Most of them wrap around its end, many are longer than the ring."""
    one, other = rings(1 << ring_bits)
    messages = [bytes((number + at) % 251 for at in range(n)) for number, n in enumerate(sizes)]
    sender, receiver = (other, one) if there_and_back else (one, other)
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(lambda: [sender.send(message, 30.0) for message in messages])
        assert [receiver.receive(30.0) for _ in messages] == messages
        sent.result()
    with pytest.raises(TimeoutError):
        receiver.receive(0.0)


def test_counts_that_pass_four_gibibytes_wrap_around() -> None:
    one, other = rings(64)
    for word in one._words[3:]:  # type: ignore[attr-defined]
        word.value = (1 << 32) - 40  # as after that many bytes
    with ThreadPoolExecutor(1) as thread:
        for number in range(20):
            sent = thread.submit(one.send, bytes([number]) * 90, 5.0)
            assert other.receive(5.0) == bytes([number]) * 90
            sent.result()


@given(pieces=st.lists(st.binary(max_size=40), max_size=8), cut=st.integers(1, 9))
def test_messages_are_put_together_however_they_are_cut(pieces: list[bytes], cut: int) -> None:
    stream = b"".join(framed(piece) for piece in pieces)
    unframer, whole = Unframer(), []
    for at in range(0, len(stream), cut):
        unframer.add(stream[at : at + cut])
        while (message := unframer.take()) is not None:
            whole.append(message)
    assert whole == pieces


@both
def test_an_oversized_message_is_refused_and_harms_nothing(
    pair: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "MESSAGE_BYTES_MAX", 1000)
    one, other = pair()
    with pytest.raises(ValueError, match="1,001 bytes"):
        one.send(bytes(1001), 5.0)
    one.send(bytes(1000), 5.0)
    assert other.receive(5.0) == bytes(1000)


@both
def test_an_announced_oversized_message_closes_the_channel(pair: Callable[[], Pair]) -> None:
    one, other = pair()
    one.send(bytes(1000), 5.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel_module, "MESSAGE_BYTES_MAX", 999)
        with pytest.raises(ChannelClosed, match="1,000 bytes"):
            other.receive(5.0)


@both
def test_a_reader_that_reads_nothing_fails_the_sender(pair: Callable[[], Pair]) -> None:
    one, other = pair()
    with pytest.raises(ChannelClosed, match="read nothing"):
        one.send(bytes(32 << 20), 0.2)  # more than any buffer takes
    with pytest.raises(ChannelClosed):
        one.send(b"next", 5.0)
    with pytest.raises(ChannelClosed):  # half a message is no message
        other.receive(5.0)


@both
def test_a_late_message_can_still_be_received(pair: Callable[[], Pair]) -> None:
    one, other = pair()
    with pytest.raises(TimeoutError):
        other.receive(0.05)
    one.send(b"late", 5.0)
    assert other.receive(5.0) == b"late"


@both
@pytest.mark.parametrize("closer", [0, 1])
def test_closing_either_end_wakes_both_after_the_last_message(
    pair: Callable[[], Pair], closer: int
) -> None:
    ends = pair()
    ends[closer].send(b"last words", 5.0)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(ends[closer].receive, None)
        time.sleep(0.05)
        ends[closer].close()
        with pytest.raises(ChannelClosed):
            waiting.result(timeout=10)
    assert ends[1 - closer].receive(5.0) == b"last words"
    with pytest.raises(ChannelClosed):
        ends[1 - closer].receive(5.0)


@pytest.mark.parametrize("kind", ["ring", "socket"])
def test_between_processes(kind: str) -> None:
    with echo(kind) as (channel, process):
        for size in (0, 1, 9_000, 3 << 20):  # the last one is longer than the ring
            message = os.urandom(size)
            with ThreadPoolExecutor(1) as thread:
                sent = thread.submit(channel.send, message, 30.0)
                assert channel.receive(30.0) == message
                sent.result()
        channel.close()
        assert process.stdout is not None
        assert process.stdout.readline() == "closed\n"


@pytest.mark.parametrize("kind", ["ring", "socket"])
def test_a_killed_reader_is_noticed_by_who_waits_for_it(kind: str) -> None:
    with echo(kind) as (channel, process), ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(channel.receive, None)
        process.send_signal(signal.SIGKILL)
        with pytest.raises(ChannelClosed):
            waiting.result(timeout=30)
        with pytest.raises(ChannelClosed):
            while True:
                channel.send(bytes(1 << 20), 5.0)


@pytest.mark.parametrize("kind", ["ring", "socket"])
def test_who_waits_does_not_spin(kind: str) -> None:
    """A worker without work takes at most 2 % of a core: of CPU time, whatever else runs."""
    with echo(kind) as (channel, process):
        channel.send(b"warm", 5.0)
        assert channel.receive(5.0) == b"warm"
        before_s = _cpu_s(process.pid)
        time.sleep(2.0)
        assert _cpu_s(process.pid) - before_s <= 0.04


def test_nobody_enters_without_the_password() -> None:
    door = Doorman("127.0.0.1")
    place, _, password = door.address.partition("/")
    with ThreadPoolExecutor(1) as thread:
        welcomed = thread.submit(door.welcome, 10.0)
        stranger = connect(f"{place}/{password[::-1]}", 5.0)
        with pytest.raises(ChannelClosed):
            stranger.receive(5.0)
        assert not welcomed.done()
        friend = connect(door.address, 5.0)
        friend.send(b"hello", 5.0)
        assert welcomed.result().receive(5.0) == b"hello"


def test_nobody_comes() -> None:
    with pytest.raises(TimeoutError):
        Doorman("127.0.0.1").welcome(0.05)
    with pytest.raises(ChannelClosed):
        RingChannel.attach(f"/proc/{os.getpid()}/fd/1000000")
    with pytest.raises(ValueError, match="power of two"):
        RingChannel.create(48)


def test_closing_from_another_thread_ends_a_send_under_way() -> None:
    one, _ = rings(64)
    threading.Timer(0.1, one.close).start()
    with pytest.raises(ChannelClosed, match="is closed"):
        one.send(bytes(1000), 60.0)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
