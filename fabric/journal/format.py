"""A journal's file: a line that says what it is, a line of JSON, then frames.

    fabric journal 1
    {"stream": "engine", "name": ..., "code": ..., "python": ...}
    | length | checksum | checksum of these two | deflated marshal of entries |  ...

Marshal is one C call for many entries, keeps floats bit for bit, and builds nothing but tuples,
numbers and strings; the checksum is looked at before it is read. A frame that is cut short at the
end of a file is what a killed process leaves; anything else that does not fit is damage.
"""

from __future__ import annotations

import json
import marshal
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from struct import Struct
from typing import Any

import fabric.core
import fabric.core.journal
from fabric.core.errors import FabricError

MAGIC = b"fabric journal 1\n"
SUFFIX = ".journal"
FRAME = Struct("<III")
SUMMED = Struct("<II")
STATE, EVENT = 0, 1

Entry = tuple[Any, ...]


class JournalError(FabricError):
    """A file is no journal, or damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Whose decisions these are, and for what the promise of the same outcomes holds: this code of
    the core on this Python. `run`: the process began then (UTC). `lost`: entries before this file
    that there was no room for. `tokens`: hashed or raw."""

    stream: str
    name: str
    run: str
    index: int
    tokens: str
    code: str
    python: str
    lost: int = 0


def code_hash() -> str:
    """Of the core's sources: other rules, another hash."""
    digest = sha256()
    folder = Path(fabric.core.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def python_version() -> str:
    """And whose."""
    return f"{sys.implementation.name} {sys.version.split()[0]}"


def first_bytes(header: Header) -> bytes:
    """What a file begins with."""
    return MAGIC + json.dumps(asdict(header)).encode() + b"\n"


def frame(entries: list[Entry]) -> bytes:
    """Entries as they stand in a file."""
    data = zlib.compress(marshal.dumps(entries), 1)
    head = SUMMED.pack(len(data), zlib.crc32(data))
    return head + zlib.crc32(head).to_bytes(4, "little") + data


class JournalFile:
    """One file, read. `torn`: its end was cut short (known once all entries are read)."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises `JournalError`."""
        self.path = path
        self.torn = False
        try:
            with path.open("rb") as file:
                magic, line = file.read(len(MAGIC)), file.readline(1 << 20)
            self._begin = len(MAGIC) + len(line)
            if magic != MAGIC:
                raise JournalError(f"{path} is no journal of this version")
            self.header = Header(**json.loads(line))
        except (OSError, ValueError, TypeError) as error:
            raise JournalError(f"{path} can't be read: {error}") from None

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """(byte where its frame begins, entry). Raises `JournalError` where the file is damaged."""
        with self.path.open("rb") as file:
            at = self._begin
            file.seek(at)
            while head := file.read(FRAME.size):
                if len(head) < FRAME.size:
                    self.torn = True
                    return
                length, checksum, of_head = FRAME.unpack(head)
                if zlib.crc32(head[: SUMMED.size]) != of_head:
                    raise JournalError(f"{self.path}: damaged at byte {at}: a frame's head")
                data = file.read(length)
                if len(data) < length:
                    self.torn = True
                    return
                if zlib.crc32(data) != checksum:
                    raise JournalError(
                        f"{self.path}: damaged between bytes {at} and {at + FRAME.size + length}"
                    )
                for entry in marshal.loads(zlib.decompress(data)):
                    yield at, entry
                at += FRAME.size + length


def resolve(name: str) -> type:
    """A class of the core by its name in a journal. Raises `JournalError`: a file may name nothing
    else."""
    module, _, path = name.partition(":")
    if not module.startswith("fabric.core."):
        raise JournalError(f"a journal names {name!r}, which is no class of the core")
    found = getattr(sys.modules.get(module), path, None)  # `core.journal` has all it can be
    if found is None:
        raise JournalError(f"a journal names {name!r}, which this version lacks")
    if not isinstance(found, type):
        raise JournalError(f"a journal names {name!r}, which is no class")
    return found
