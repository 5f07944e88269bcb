"""What a replica tells the terminal while it loads, by way of Ray's own key-value store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray.experimental import internal_kv

from fabric.core.errors import FabricError

PREFIX = b"fabric-progress/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One thing that happened. `fatal`: trying again will not help."""

    replica: str
    number: int
    text: str
    fatal: bool = False


class Progress:
    """The writing end, in a replica."""

    def __init__(self, replica: str) -> None:
        self.replica = replica
        self._number = 0

    def say(self, text: str, *, fatal: bool = False) -> None:
        """Show one line in the terminal of `fabric serve`."""
        key = PREFIX + f"{self.replica}/{self._number:04d}".encode()
        value = json.dumps({"text": text, "fatal": fatal}).encode()
        internal_kv._internal_kv_put(key, value)
        self._number += 1

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Tell the launcher why loading failed; Serve would show a traceback, and try again."""
        try:
            yield
        except FabricError as error:
            self.say(str(error), fatal=True)
            raise
        except Exception as error:
            self.say(f"loading failed: {type(error).__name__}: {error}", fatal=True)
            raise


def read_lines(seen: set[bytes]) -> list[Line]:
    """The reading end, in the launcher: lines that are not in `seen` yet (they are added to it)."""
    lines = []
    for key in sorted(internal_kv._internal_kv_list(PREFIX)):
        if key in seen:
            continue
        seen.add(key)
        value = json.loads(internal_kv._internal_kv_get(key) or b"{}")
        replica, number = key.removeprefix(PREFIX).decode().rsplit("/", 1)
        lines.append(
            Line(replica=replica, number=int(number), text=value["text"], fatal=value["fatal"])
        )
    return lines
