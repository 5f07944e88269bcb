"""`fabric explain`: what became of a request, and why, from the journals of those who decided."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fabric.core.engine.engine import Engine
from fabric.core.replay import Played, Replay, Verb
from fabric.core.traffic.admission import Admission
from fabric.journal.command import clock, described
from fabric.journal.format import JournalError
from fabric.journal.in_engine import InEngine
from fabric.journal.in_queue import InQueue
from fabric.journal.reader import Journal, journals, play, replay_of
from fabric.journal.story import Story, render

HELP = """\
Tells what became of a request: why it waited, where it went and why there, what preempted it.
The journals of a server (`journal.path` in its configuration) are replayed while somebody looks on.

ID stands in the request's answer: chatcmpl-0123..., cmpl-0123..., or without what is before the -.

examples:
  fabric explain chatcmpl-3f2a... --journal ~/.cache/fabric/journal

exit codes: 0 told, 1 the journals don't know it or are damaged, 2 wrong usage"""
OWN = ("admission", "engine")  # the machines of a live process that this is about
PREFIXES = ("chatcmpl-", "cmpl-")


def main(words: Sequence[str]) -> int:
    """Run `fabric explain WORDS...`."""
    arguments = parser().parse_args(words)
    name: str = arguments.id
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    try:
        found = journals([arguments.journal])
        told = [story for journal in found for story in _stories(journal, name)]
    except JournalError as problem:
        print(f"fabric explain: {problem}", file=sys.stderr)
        return 1
    if not told:
        print(f"fabric explain: no journal knows of {name}", file=sys.stderr)
        return 1
    first = min(story.lines[0].at for story in told)
    print(f"{name}, from {clock(first)} on\n\n{render(told)}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Its flags; tests/law/test_cli.py freezes them."""
    command = argparse.ArgumentParser(
        prog="fabric explain",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("id", metavar="ID")
    command.add_argument("--journal", type=Path, required=True, metavar="FOLDER")
    return command


class _Onlookers:
    """One for each queue and engine of a journal, made when it is first called."""

    def __init__(self, replay: Replay, name: str, title: str) -> None:
        self._replay = replay
        self._name = name
        self._title = title
        self._looks: dict[str, InQueue | InEngine | None] = {}
        replay.before = self._before

    def after(self, played: Played) -> None:
        """A verb has been played."""
        looks = self._of(played.machine)
        if looks is not None:
            looks.after(played)

    def stories(self) -> list[Story]:
        """What they have seen."""
        return [looks.story for looks in self._looks.values() if looks and looks.story.lines]

    def _before(self, machine: Any, verb: Verb, arguments: tuple[Any, ...]) -> None:
        looks = self._of(verb.machine)
        if looks is not None:
            looks.before(machine, verb, arguments)

    def _of(self, machine: str) -> InQueue | InEngine | None:
        """The one that sees to it: a queue and its router are one; names may begin with whose."""
        owner, _, part = machine.rpartition(".")
        queue = f"{owner}.admission".lstrip(".")
        key = queue if part in ("admission", "router") else machine
        if key not in self._looks:
            where = f"{self._title} {owner or machine}" if owner or key not in OWN else self._title
            known = self._replay.machines.get(key)
            if isinstance(known, Admission):
                self._looks[key] = InQueue(self._replay, self._name, where, key)
            elif isinstance(known, Engine):
                self._looks[key] = InEngine(self._replay, self._name, where, key)
            else:
                self._looks[key] = None
        return self._looks[key]


def _stories(journal: Journal, name: str) -> list[Story]:
    """What this journal says of it."""
    replay = replay_of(journal)
    onlookers = _Onlookers(replay, name, journal.title)
    for step in play(journal, replay):
        if step.difference is not None:
            where = described(step)
            raise JournalError(f"the replay is not what was recorded, so nothing is told: {where}")
        if step.verb is not None and replay.played is not None:
            onlookers.after(replay.played)
    return onlookers.stories()
