"""`Channel`: how plans reach a worker in another process, and how its results come back.

    engine's process                              worker's process
    send(plan)  ──── whole messages, in order ───>  receive()
    receive()   <─────────────────────────────────  send(result)

Inside a machine a ring in shared memory (`plan_ring`), between machines TCP (`plan_socket`). Who
waits sleeps. Each end may have one sender and one receiver thread; any thread may close.
"""

from __future__ import annotations

from typing import Protocol

MESSAGE_BYTES_MAX = 64 << 20  # a plan that starts 256 sequences of 32,000 tokens has 40 MB
LENGTH_BYTES = 4


class ChannelClosed(Exception):
    """Nothing comes or goes any more: an end was closed, or its process is gone."""


class Channel(Protocol):
    """One end of a two-way connection."""

    def send(self, data: bytes, timeout_s: float) -> None:
        """Hand one message over; waits while the other end is behind.

        Raises `ChannelClosed`, also when the other end has made no room in time; `ValueError`
        beyond `MESSAGE_BYTES_MAX`.
        """
        ...

    def receive(self, timeout_s: float | None) -> bytes:
        """The next message. Raises `ChannelClosed` after the last one, and `TimeoutError`; then
        it can be asked for again. `timeout_s` None: wait for as long as the other end lives."""
        ...

    def close(self) -> None:
        """Both ends wake up; what was sent before can still be received."""
        ...


def framed(data: bytes) -> bytes:
    """A message as it travels: its length, then itself. Raises `ValueError` for one too long."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise ValueError(f"a message of {len(data):,} bytes; at most {MESSAGE_BYTES_MAX:,} travel")
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


class Unframer:
    """Bytes as they come -> whole messages."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def add(self, data: bytes | memoryview) -> None:
        """Bytes have come."""
        self._pending += data

    def take(self) -> bytes | None:
        """The next message, if it is all there. Raises `ChannelClosed` for what can't be one."""
        if len(self._pending) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._pending[:LENGTH_BYTES], "little")
        if length > MESSAGE_BYTES_MAX:
            raise ChannelClosed(f"the other end announces a message of {length:,} bytes")
        end = LENGTH_BYTES + length
        if len(self._pending) < end:
            return None
        message = bytes(memoryview(self._pending)[LENGTH_BYTES:end])
        del self._pending[:end]
        return message
