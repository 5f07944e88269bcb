"""A server's processes, and their memory as PSS: shared pages count once."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_KIB = re.compile(r"^(Pss|Pss_Shmem|Rss):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """One process. `shared_bytes`: the part of its PSS in shared memory, as the object store is."""

    pid: int
    name: str
    pss_bytes: int
    shared_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Descendant:
    """A process, told apart from a later one of the same number by when it began (clock ticks)."""

    pid: int
    began: int


def descendants(root: int) -> list[Descendant]:
    """All processes below `root`."""
    children = _children()
    found, open_list = [], list(children.get(root, ()))
    while open_list:
        process = open_list.pop()
        found.append(process)
        open_list += children.get(process.pid, ())
    return found


def alive(process: Descendant) -> bool:
    """It still runs (a zombie does not)."""
    stat = _stat(process.pid)
    return stat is not None and stat.began == process.began and stat.state != "Z"


def processes_of(root: int) -> list[ProcessMemory]:
    """A process and all its descendants, largest first. Empty where there is no /proc."""
    found = []
    for pid in [root, *(one.pid for one in descendants(root))]:
        with suppress(OSError):  # it has ended meanwhile
            found.append(_measure(pid))
    return sorted(found, key=lambda one: -one.pss_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stat:
    state: str
    parent: int
    began: int


def _stat(pid: int) -> _Stat | None:
    try:
        # "pid (name) state ppid ..."; the name may hold spaces and brackets.
        fields = (PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return _Stat(state=fields[0], parent=int(fields[1]), began=int(fields[19]))


def _children() -> dict[int, list[Descendant]]:
    children: dict[int, list[Descendant]] = {}
    if not PROC.is_dir():
        return children
    for entry in PROC.iterdir():
        stat = _stat(int(entry.name)) if entry.name.isdigit() else None
        if stat is not None:
            process = Descendant(pid=int(entry.name), began=stat.began)
            children.setdefault(stat.parent, []).append(process)
    return children


def _measure(pid: int) -> ProcessMemory:
    folder = PROC / str(pid)
    sizes = {
        name: int(kib) << 10 for name, kib in _KIB.findall((folder / "smaps_rollup").read_text())
    }
    command = (folder / "cmdline").read_bytes().split(b"\0")
    return ProcessMemory(
        pid=pid,
        name=_short_name([word.decode(errors="replace") for word in command if word]),
        pss_bytes=sizes.get("Pss", 0),
        shared_bytes=sizes.get("Pss_Shmem", 0),
    )


def _short_name(words: list[str]) -> str:
    """A Python program goes by its script's name, a Ray worker by the title that Ray gave it."""
    if not words:
        return "(ended)"
    if words[0].startswith("ray::"):
        return words[0]
    scripts = [word for word in words[1:] if word.endswith(".py")]
    name = Path(scripts[0]).name if scripts and "python" in words[0] else Path(words[0]).name
    return name[:60]
