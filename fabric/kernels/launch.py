"""`Launch`: how one kernel is launched: its block sizes, warps and pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """`sizes` are the kernel's compile-time constants that may be chosen freely: the result is the
    same for all of them but for the order of sums. `stages`: depth of the load pipeline."""

    sizes: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2

    def size(self, name: str) -> int:
        """One of the sizes. Raises `KeyError` for one that this launch does not set."""
        return dict(self.sizes)[name]

    def options(self) -> dict[str, int]:
        """Keyword arguments of every launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}
