"""From the deciding thread to files: a bounded buffer, and a thread that empties it.

    decisions ── put (a few hundred ns) ──> buffer ── five times a second ──> frames, files

Nothing is encoded in the deciding thread, and nothing waits for a disk. When the buffer is full
entries are dropped and counted; the next file begins with all states anew and says how many are
missing before it, so what is there can always be replayed. Written frames survive the death of the
process; a file is synced to the disk when it is closed, so that of the machine only closed ones.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from fabric.core.freeze import sealed
from fabric.core.journal import Begin, Event, State
from fabric.core.packing import Packer
from fabric.journal.format import (
    EVENT,
    STATE,
    SUFFIX,
    Entry,
    Header,
    code_hash,
    first_bytes,
    frame,
    python_version,
)

FLUSH_S = 0.2
BUFFERED = 20_000  # entries; a busy engine makes about 250 a second
FRAME_ENTRIES = 512
# Verbs that are told hashes of tokens; all others ask for theirs (`Event.noted`).
WITH_HASHES = ("landed", "borrow", "lend")

log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process writes: `files` of about `file_bytes` are kept. `stream`: engine, dispatcher,
    autoscaler or simulation; `run`: when the process began, as in `Header`.

    `keyed`: hashes of blocks get a secret that dies with the process, so that nobody can try
    guesses on them. (A policy that reckons with their values can't have that.)
    """

    folder: Path
    stream: str
    name: str
    run: str
    file_bytes: int = 64 << 20
    files: int = 8
    hide: bool = True
    keyed: bool = True


class Writer:
    """A `core.journal.Sink`. `background` False: whoever puts writes too (a simulator)."""

    def __init__(self, place: Place, *, background: bool = True) -> None:
        self.fresh = False
        self.dropped = 0  # in all
        self.bytes_written = 0
        self.problem: str | None = None  # why nothing is written any more
        self._place = place
        self._packer = Packer(hide=place.hide)
        self._seal = _sealer() if place.hide and place.keyed else None
        self._buffer: deque[Event | State | Begin] = deque()
        self._lost = 0  # dropped since the last beginning
        self._dropping = False
        self._file: BinaryIO | None = None
        self._paths: deque[Path] = deque()
        self._index = 0
        self._size = 0
        self._stopping = threading.Event()
        self._writing = threading.Lock()
        self._thread: threading.Thread | None = None
        place.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if background:
            self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
            self._thread.start()

    def put(self, entry: Event | State | Begin) -> None:
        """Take an entry, or drop it, and then all up to a beginning that has room."""
        if type(entry) is Begin and len(self._buffer) <= BUFFERED // 2:
            entry = Begin(self._lost)
            self._lost, self._dropping = 0, False
        if self._dropping or len(self._buffer) >= BUFFERED or self.problem is not None:
            self.dropped += 1
            self._lost += 1
            self._dropping = True
            self.fresh = self.problem is None
            return
        self._buffer.append(entry)
        if self._thread is None and len(self._buffer) >= FRAME_ENTRIES:
            self.flush()

    def flush(self) -> None:
        """Write what is there."""
        with self._writing:
            while self._buffer and self.problem is None:
                try:
                    self._write()
                except OSError as error:
                    self.problem = f"{type(error).__name__}: {error}"
                    log.error("the journal ends here: %s", self.problem)
            if self._file is not None and self.problem is None:
                self._file.flush()

    def close(self) -> None:
        """Write the rest and end the file."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(10.0)
        self.flush()
        with self._writing:
            self._end_file()

    def _run(self) -> None:
        while not self._stopping.wait(FLUSH_S):
            self.flush()

    def _write(self) -> None:
        """One frame, or a new file."""
        entries: list[Entry] = []
        while self._buffer and len(entries) < FRAME_ENTRIES:
            first = self._buffer[0]
            if isinstance(first, Begin):
                if entries:
                    break
                self._buffer.popleft()
                self._begin_file(first.lost)
                continue
            entries.append(self._encoded(self._buffer.popleft()))
        if entries and self._file is not None:
            data = frame(entries)
            self._file.write(data)
            self._size += len(data)
            self.bytes_written += len(data)
        if self._size > self._place.file_bytes:
            self._size = 0  # asked for once
            self.fresh = True

    def _encoded(self, entry: Event | State | Begin) -> Entry:
        seal, packer = self._seal, self._packer
        if isinstance(entry, State):
            return (STATE, entry.machine, sealed(entry.data, seal) if seal else entry.data)
        assert isinstance(entry, Event), "a beginning in the middle"
        arguments = packer.arguments(entry)
        if seal and entry.verb in WITH_HASHES:
            arguments = sealed(arguments, seal)
        outcome = packer.outcome(entry.verb, entry.outcome)
        if seal and entry.verb in WITH_HASHES:
            outcome = sealed(outcome, seal)
        return (
            EVENT,
            entry.machine,
            entry.verb,
            arguments,
            packer.named(entry),
            outcome,
            tuple(map(seal, entry.noted)) if seal else entry.noted,
            entry.stops,
        )

    def _begin_file(self, lost: int) -> None:
        self._end_file()
        place = self._place
        header = Header(
            stream=place.stream,
            name=place.name,
            run=place.run,
            index=self._index,
            tokens="hashed" if place.hide else "raw",
            code=code_hash(),
            python=python_version(),
            lost=lost,
        )
        name = f"{place.stream}.{place.name}.{place.run}.{self._index:06}{SUFFIX}"
        path = place.folder / name
        self._index += 1
        # For nobody else's eyes: with `hide` off it holds what people wrote.
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
        self._file.write(first_bytes(header))
        self._size = 0
        self._paths.append(path)
        while len(self._paths) > place.files:
            self._paths.popleft().unlink(missing_ok=True)

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _sealer() -> Callable[[bytes], bytes]:
    key = os.urandom(32)

    def seal(digest: bytes) -> bytes:
        return blake2b(digest, digest_size=16, key=key).digest()

    return seal
