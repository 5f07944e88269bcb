"""What a benchmark promised, as its last lines, its record and its exit code say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabric.bench.report import DISTURBING_CPUS

# What is promised, what was found, and whether that meets it.
Target = tuple[str, str, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`others`: the CPUs that the rest of the machine took in each of the runs, where known."""

    targets: Sequence[Target]
    others: Sequence[float] = ()

    @property
    def exit_code(self) -> int:
        """1 when a target was missed."""
        return 0 if all(met for *_, met in self.targets) else 1

    def text(self) -> str:
        """A line a target; then whether the figures can be quoted."""
        lines = [
            f"  {'met   ' if met else 'MISSED'}  {text}: {found}"
            for text, found, met in self.targets
        ]
        if disturbed := sum(one > DISTURBING_CPUS for one in self.others):
            runs = f"{disturbed} of {len(self.others)}"
            lines.append(f"{runs} were disturbed by other processes; don't quote them")
        return "\n".join(lines)

    def records(self) -> list[dict[str, Any]]:
        """JSON-able."""
        return [{"text": text, "found": found, "met": met} for text, found, met in self.targets]


def folder_of(results: Path | None) -> Path:
    """Where configurations and logs of servers lie: beside the results, if these are written."""
    return results.parent if results else Path("bench-results")
