"""`fabric replay`: every recorded decision is made again, and must be the same."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fabric.journal.format import JournalError, code_hash, python_version
from fabric.journal.reader import Journal, Step, journals, play, replay_of

NS_PER_S = 1_000_000_000

HELP = """\
Plays the recorded inputs of a live system (or of a simulation) to fresh engines, queues, routers
and autoscalers. Every decision must come out again, bit for bit.

FILE is a journal's file or a folder of them; `journal.path` in the configuration writes them.

examples:
  fabric replay journals/
  fabric replay journals/engine.*.journal

exit codes: 0 all the same, 1 a decision differs or a file is damaged, 2 wrong usage"""


def main(words: Sequence[str]) -> int:
    """Run `fabric replay WORDS...`."""
    arguments = parser().parse_args(words)
    try:
        found = journals(arguments.files)
        same = [_replay(journal) for journal in found]
    except JournalError as problem:
        print(f"fabric replay: {problem}", file=sys.stderr)
        return 1
    return 0 if all(same) else 1


def parser() -> argparse.ArgumentParser:
    """Its flags; tests/law/test_cli.py freezes them."""
    command = argparse.ArgumentParser(
        prog="fabric replay",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    return command


def _replay(journal: Journal) -> bool:
    for line in _notes(journal):
        print(f"{journal.title}: {line}")
    replay = replay_of(journal)
    began, verbs = time.perf_counter(), 0
    first = last = None
    for step in play(journal, replay):
        if step.difference is not None:
            print(f"{journal.title}: {described(step)}")
            return False
        if step.verb is None:
            continue
        verbs += 1
        now = replay.played.now if replay.played else None
        if now is not None:
            first, last = first or now, now
    torn = [file.path.name for file in journal.files if file.torn]
    if torn:
        print(f"{journal.title}: {', '.join(torn)} was cut short: the process was killed")
    took_s = max(time.perf_counter() - began, 1e-9)
    seconds = (last - first) / NS_PER_S if first is not None and last is not None else 0.0
    print(
        f"{journal.title}: {verbs:,} verbs in {len(journal.files)} files over {seconds:,.1f} s: "
        f"every outcome is the same ({verbs / took_s:,.0f} verbs/s, "
        f"{seconds / took_s:,.1f} × real time)"
    )
    return True


def _notes(journal: Journal) -> list[str]:
    """For what the promise does not hold, and what is missing."""
    notes = []
    header = journal.header
    if header.code != code_hash():
        notes.append("recorded by another version of the core: what differs may be a new rule")
    if header.python != python_version():
        notes.append(f"recorded on {header.python}, and this is {python_version()}")
    for before, file in zip(journal.files, journal.files[1:], strict=False):
        missing = file.header.index - before.header.index - 1
        if missing:
            notes.append(f"{missing} files are missing before {file.path.name}")
        if file.header.lost:
            notes.append(
                f"{file.header.lost:,} entries before {file.path.name} were dropped: "
                "they came faster than they could be written"
            )
    return notes


def described(step: Step) -> str:
    """A difference, in words."""
    found = step.difference
    assert found is not None
    when = "" if found.now is None else f" at {clock(found.now)}"
    return (
        f"{step.file.path.name}, verb {step.number}{when}: {found.machine}.{found.verb}: "
        f"{found.where} differs\n  recorded: {found.recorded}\n  replayed: {found.replayed}"
    )


def clock(now: int) -> str:
    """ns as a time of the day (UTC), to the microsecond; of a simulation, seconds."""
    if now < 10**17:  # a simulation's clock begins at 0
        return f"{now / NS_PER_S:.6f} s"
    return datetime.fromtimestamp(now / NS_PER_S, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
