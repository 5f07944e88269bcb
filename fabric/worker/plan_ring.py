"""`RingChannel`: a channel through shared memory, for two processes of one machine.

    page  closed | pids | written, read of each way        (each word in a cache line of its own)
    ring  bytes from the maker to its peer, a power of two long
    ring  bytes from the peer to the maker

`written` and `read` count bytes modulo 2^32: what lies between them is under way. They are futexes
too: who finds nothing to read (or no room) sleeps until the other end has moved its count. So one
writer and one reader need no lock: each moves one count, after the bytes that it stands for.

That needs a CPU that keeps the order of stores, as x86 does, and Linux: elsewhere `plan_socket`
serves. The memory has no name (memfd): it is gone with the last process that holds it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
import sys
import time

from fabric.worker.channel import ChannelClosed, Unframer, framed

RING_BYTES = 1 << 20
# How often a sleeper looks whether its peer lives: a killed process wakes nobody.
LOOK_S = 0.5

_COUNT = 1 << 32
_LINE = 64
_HEADER_BYTES = mmap.PAGESIZE
_CLOSED, _MAKER_PID, _PEER_PID = 0, 1, 2
_WAYS = (3, 5)  # of each way: `written`, and `read` behind it
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1  # x86-64; see futex(2)


_SYSCALL = ctypes.CDLL(None).syscall


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def rings_work_here() -> bool:
    """This machine can have `RingChannel`s."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


class RingChannel:
    """One end. `create` it, tell the other process its `address`, and there `attach`."""

    def __init__(self, file: int, *, ring_bytes: int, is_maker: bool) -> None:
        if ring_bytes < 16 or ring_bytes & (ring_bytes - 1) or ring_bytes >= _COUNT // 2:
            raise ValueError("a ring is a power of two, from 16 bytes to 1 GiB")
        self._file = file
        self._mine, self._theirs = (_MAKER_PID, _PEER_PID) if is_maker else (_PEER_PID, _MAKER_PID)
        self._memory = mmap.mmap(file, _HEADER_BYTES + 2 * ring_bytes)
        self._words = [
            ctypes.c_uint32.from_buffer(self._memory, index * _LINE) for index in range(7)
        ]
        self._words[self._mine].value = os.getpid()
        self._peer: int | None = None  # a pidfd
        out, back = (0, 1) if is_maker else (1, 0)
        self._out = _Way(self, out, ring_bytes)
        self._in = _Way(self, back, ring_bytes)
        self._unframer = Unframer()

    @classmethod
    def create(cls, ring_bytes: int = RING_BYTES) -> RingChannel:
        """A new channel; the bytes of a longer message go through the ring in turns."""
        file = os.memfd_create("fabric-plans", os.MFD_CLOEXEC)
        os.ftruncate(file, _HEADER_BYTES + 2 * ring_bytes)
        return cls(file, ring_bytes=ring_bytes, is_maker=True)

    @property
    def address(self) -> str:
        """For `attach`, while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    @classmethod
    def attach(cls, address: str) -> RingChannel:
        """The other end. Raises `ChannelClosed` if its maker is gone."""
        try:
            file = os.open(address, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ChannelClosed(f"nobody is at {address}: {error.strerror}") from None
        ring_bytes = (os.fstat(file).st_size - _HEADER_BYTES) // 2
        return cls(file, ring_bytes=ring_bytes, is_maker=False)

    def send(self, data: bytes, timeout_s: float) -> None:
        """See `Channel`."""
        deadline = time.monotonic() + timeout_s
        left = memoryview(framed(data))
        while left:
            if self._words[_CLOSED].value:
                raise ChannelClosed("the channel is closed")
            written = self._out.put(left)
            left = left[written:]
            if not written and not self._sleep(*self._out.full(), deadline):
                self.close()  # half a message is in the ring: nothing may follow it
                raise ChannelClosed(f"the other end has read nothing for {timeout_s:.0f} s")

    def receive(self, timeout_s: float | None) -> bytes:
        """See `Channel`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := self._unframer.take()) is None:
            closed = self._words[_CLOSED].value  # before looking for bytes: what came first counts
            data = self._in.take()
            if data:
                self._unframer.add(data)
            elif closed:
                raise ChannelClosed("the channel is closed")
            elif not self._sleep(*self._in.empty(), deadline):
                raise TimeoutError(f"no message for {timeout_s:.0f} s")
        return message

    def close(self) -> None:
        """See `Channel`."""
        self._words[_CLOSED].value = 1
        for word in self._words[_WAYS[0] :]:
            _wake(word)

    def _sleep(self, word: ctypes.c_uint32, seen: int, deadline: float | None) -> bool:
        """Until `word` is no longer `seen`, or for a while. False: the deadline has passed."""
        left_s = LOOK_S if deadline is None else min(LOOK_S, deadline - time.monotonic())
        if left_s <= 0:
            return False
        _wait(word, seen, left_s)
        if word.value == seen and self._peer_is_gone():
            self.close()
        return True

    def _peer_is_gone(self) -> bool:
        pid = self._words[self._theirs].value
        if pid == 0:  # it has not attached yet
            return False
        try:
            if self._peer is None:
                self._peer = os.pidfd_open(pid)
        except OSError:
            return True
        ended = select.poll()
        ended.register(self._peer, select.POLLIN)
        return bool(ended.poll(0))

    def __del__(self) -> None:
        for file in (getattr(self, "_file", None), getattr(self, "_peer", None)):
            if file is not None:
                os.close(file)


class _Way:
    """The bytes of one direction, as one end sees them."""

    def __init__(self, channel: RingChannel, way: int, ring_bytes: int) -> None:
        self._written = channel._words[_WAYS[way]]
        self._read = channel._words[_WAYS[way] + 1]
        begin = _HEADER_BYTES + way * ring_bytes
        self._ring = memoryview(channel._memory)[begin : begin + ring_bytes]
        self._bytes = ring_bytes

    def put(self, data: memoryview) -> int:
        """Write as much as there is room for; how much that was."""
        written = self._written.value
        room = self._bytes - (written - self._read.value) % _COUNT
        at = written % self._bytes
        count = min(room, len(data))
        first = min(count, self._bytes - at)
        self._ring[at : at + first] = data[:first]
        self._ring[: count - first] = data[first:count]
        if count:
            self._written.value = (written + count) % _COUNT
            _wake(self._written)
        return count

    def take(self) -> bytes:
        """Everything that has come."""
        read = self._read.value
        count = (self._written.value - read) % _COUNT
        at = read % self._bytes
        first = min(count, self._bytes - at)
        data = bytes(self._ring[at : at + first]) + bytes(self._ring[: count - first])
        if count:
            self._read.value = (read + count) % _COUNT
            _wake(self._read)
        return data

    def full(self) -> tuple[ctypes.c_uint32, int]:
        """What to sleep on while there is no room: a word, and its value until then."""
        return self._read, (self._written.value - self._bytes) % _COUNT

    def empty(self) -> tuple[ctypes.c_uint32, int]:
        """The same while there is nothing to read."""
        return self._written, self._read.value


def _wait(word: ctypes.c_uint32, seen: int, timeout_s: float) -> None:
    """Sleep while `word` holds `seen`; the kernel compares, so no wake-up can be missed."""
    seconds, rest = divmod(timeout_s, 1.0)
    timeout = _Timespec(int(seconds), int(rest * 1e9))
    _SYSCALL(
        _SYS_FUTEX, ctypes.byref(word), _FUTEX_WAIT, ctypes.c_uint32(seen), ctypes.byref(timeout)
    )


def _wake(word: ctypes.c_uint32) -> None:
    _SYSCALL(_SYS_FUTEX, ctypes.byref(word), _FUTEX_WAKE, 1 << 30)
