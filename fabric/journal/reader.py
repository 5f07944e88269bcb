"""Journals found, ordered and played: what `fabric replay` and `fabric explain` have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fabric.core.replay import Difference, Replay, Verb
from fabric.journal.format import (
    EVENT,
    STATE,
    SUFFIX,
    Header,
    JournalError,
    JournalFile,
    code_hash,
    resolve,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """The files of one process, in order; at least one."""

    files: tuple[JournalFile, ...]

    @property
    def header(self) -> Header:
        """Of the first one."""
        return self.files[0].header

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.header.stream} {self.header.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One entry that was played. `number`: of the verb in its file; `byte`: where its frame begins;
    `verb` None: a state at a file's beginning. `continues`: nothing is missing before it."""

    file: JournalFile
    number: int
    byte: int
    verb: Verb | None
    difference: Difference | None


def journals(paths: Iterable[Path]) -> list[Journal]:
    """Of these files, and all in these folders. Raises `JournalError`: there is none."""
    found: list[JournalFile] = []
    for path in paths:
        files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not files:
            raise JournalError(f"{path} holds no journal")
        found += map(JournalFile, files)
    groups: dict[tuple[str, str, str], list[JournalFile]] = {}
    for file in found:
        header = file.header
        groups.setdefault((header.run, header.stream, header.name), []).append(file)
    return [
        Journal(files=tuple(sorted(files, key=lambda one: one.header.index)))
        for _, files in sorted(groups.items())
    ]


def play(journal: Journal, replay: Replay) -> Iterator[Step]:
    """Every entry, played. Goes on after a difference; whoever looks on stops."""
    before: Header | None = None
    for file in journal.files:
        header = file.header
        joined = before is not None and before.index + 1 == header.index and not header.lost
        if not joined:
            replay.machines.clear()
        before = header
        number = 0
        for byte, entry in file.entries():
            if entry[0] == STATE:
                with _readable(file, byte):
                    difference = replay.state(entry[1], entry[2], continued=joined and not number)
                yield Step(file=file, number=number, byte=byte, verb=None, difference=difference)
                continue
            if entry[0] != EVENT:
                raise JournalError(f"{file.path}: an entry of kind {entry[0]!r}")
            number += 1
            with _readable(file, byte):
                verb = Verb(
                    machine=entry[1],
                    verb=entry[2],
                    arguments=entry[3],
                    named=entry[4],
                    outcome=entry[5],
                    noted=entry[6],
                    stops=entry[7],
                )
                difference = replay.event(verb)
            yield Step(file=file, number=number, byte=byte, verb=verb, difference=difference)


@contextmanager
def _readable(file: JournalFile, byte: int) -> Iterator[None]:
    """What this version can't make sense of is damage, or another version's."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise JournalError(
            f"{file.path}, byte {byte}: this version can't read it "
            f"({type(error).__name__}: {error}); it was recorded by code {file.header.code}, "
            f"this is {code_hash()}"
        ) from error


def replay_of(journal: Journal) -> Replay:
    """Machines to play it to."""
    return Replay(resolve, hide=journal.header.tokens == "hashed")
