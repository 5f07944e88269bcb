"""One run of `fabric serve`: where it keeps its things."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`folder` is private (mode 0700), short-named and removed at the end; `logs` are kept.

    `cache`: fabric's cache folder, for compiled kernels.
    """

    folder: Path
    logs: Path
    cache: Path
    launcher_pid: int

    @property
    def sockets(self) -> Path:
        """For `local_stream`."""
        return self.folder / "s"
