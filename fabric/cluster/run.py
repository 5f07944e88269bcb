"""One run of `fabric serve`, or one application on a cluster: where it keeps its things."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`folder` is private (mode 0700), short-named and removed at the end; `logs` are kept.

    `cache`: fabric's cache folder, for compiled kernels. On a cluster (`fabric deploy`) there is
    no launcher; the paths mean the same on every node, and nothing is put into `folder`, which no
    two nodes share.
    """

    folder: Path
    logs: Path
    cache: Path
    launcher_pid: int | None

    @property
    def on_cluster(self) -> bool:
        """Nodes that others started, and others use: replicas claim what they take."""
        return self.launcher_pid is None

    @property
    def sockets(self) -> Path | None:
        """For `local_stream`; None on a cluster."""
        return None if self.on_cluster else self.folder / "s"
