"""A step from the times of its kernels, as LLMServingSim's profiler writes them: three CSV files.

    dense.csv          layer, tokens, time_us        everything that goes by tokens
    per_sequence.csv   layer, sequences, time_us     what is done for a sequence: logits, sampling
    attention.csv      prefill_chunk, kv_prefill, n_decode, kv_decode, time_us

Times of one layer of the decoder; between grid points they are linear, beyond the last one too.
(LLMServingSim: Cho et al., IISWC 2024.)
"""

from __future__ import annotations

import csv
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from fabric.sim.costs import StepShape

NS_PER_US = 1_000
# Once a step; all else of dense.csv once a layer, norms twice.
ONCE = ("embedding", "final_layernorm")
TWICE_A_LAYER = ("layernorm",)
AXES = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")

Line = tuple[tuple[float, float], ...]  # (x, us), x rising
Point = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTables:
    """`Costs` of a model of so many layers. `overhead_ns`: of each step, beside its kernels."""

    dense: Line
    per_sequence: Line
    axes: tuple[tuple[float, ...], ...]
    attention: dict[Point, float]
    layers: int
    overhead_ns: int = 0

    def step_ns(self, shape: StepShape) -> int:
        """See `Costs`. All chunks of prompts count as one, of their tokens together."""
        decodes = shape.rows - shape.chunks
        decode_context = (shape.context - shape.chunk_context) / decodes if decodes else 0.0
        past = (shape.chunk_context - shape.chunk_tokens) / shape.chunks if shape.chunks else 0.0
        attention_us = self.attention_us((shape.chunk_tokens, past, decodes, decode_context))
        us = line(self.dense, shape.tokens) + line(self.per_sequence, shape.rows)
        return max(1, self.overhead_ns + round(NS_PER_US * (us + self.layers * attention_us)))

    def attention_us(self, point: Point) -> float:
        """Of one layer, multilinear; a corner that was not measured (no decodes: no context of
        decodes) is the one with zeros there."""
        corners = [_corners(axis, value) for axis, value in zip(self.axes, point, strict=True)]
        total = 0.0
        for choice in product(*corners):
            weight = 1.0
            for _, share in choice:
                weight *= share
            if weight:
                total += weight * self._measured([at for at, _ in choice])
        return total

    def _measured(self, corner: Sequence[float]) -> float:
        chunk, past, decodes, context = corner
        if not chunk:
            past = 0.0
        if not decodes:
            context = 0.0
        elif not context:
            context = self.axes[3][1]
        return self.attention.get((chunk, past, decodes, context), 0.0)


def read_kernel_tables(folder: Path, layers: int) -> KernelTables:
    """Raises `ValueError` that names a file which is not what it should be, and `OSError`."""
    dense: dict[str, dict[float, float]] = {}
    for row in _rows(folder / "dense.csv", ("layer", "tokens", "time_us")):
        dense.setdefault(row["layer"], {})[float(row["tokens"])] = float(row["time_us"])
    sequences: dict[str, dict[float, float]] = {}
    for row in _rows(folder / "per_sequence.csv", ("layer", "sequences", "time_us")):
        sequences.setdefault(row["layer"], {})[float(row["sequences"])] = float(row["time_us"])
    attention = {
        tuple(float(row[axis]) for axis in AXES): float(row["time_us"])
        for row in _rows(folder / "attention.csv", (*AXES, "time_us"))
    }

    def times(name: str) -> int:
        return 1 if name in ONCE else layers * (2 if name in TWICE_A_LAYER else 1)

    return KernelTables(
        dense=_sum([(times(name), table) for name, table in sorted(dense.items())]),
        per_sequence=_sum([(1, table) for _, table in sorted(sequences.items())]),
        axes=tuple(tuple(sorted({point[axis] for point in attention})) for axis in range(4)),
        attention=attention,
        layers=layers,
    )


def line(table: Line, x: float) -> float:
    """Piecewise linear; what lies outside goes on as the nearest piece does."""
    high = min(max(bisect_left(table, (x,)), 1), len(table) - 1)
    (x0, y0), (x1, y1) = table[high - 1], table[high]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _corners(axis: tuple[float, ...], value: float) -> tuple[tuple[float, float], ...]:
    """The two grid points around a value, each with its share."""
    high = min(max(bisect_left(axis, value), 1), len(axis) - 1)
    low_at, high_at = axis[high - 1], axis[high]
    share = (value - low_at) / (high_at - low_at)
    return (low_at, 1 - share), (high_at, share)


def _sum(tables: Sequence[tuple[int, dict[float, float]]]) -> Line:
    grids = [sorted(table) for _, table in tables]
    if any(grid != grids[0] for grid in grids) or len(grids[0]) < 2:
        raise ValueError("kernels measured at different sizes, or at one only")
    return tuple((x, sum(count * table[x] for count, table in tables)) for x in grids[0])


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}")
        return list(reader)
