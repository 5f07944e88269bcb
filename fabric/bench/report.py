"""Results as people read them (a table in a terminal, Markdown) and as programs do (JSON)."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fabric.bench.load import Cell
from fabric.bench.stats import Spread, Summary

# An idle machine's own doings are at about 0.02 of a CPU.
DISTURBING_CPUS = 0.1
CPU_FEATURES = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One cell's result. `others`: the CPUs that neither server nor client used, where known."""

    cell: Cell
    summary: Summary
    others: float | None = None

    @property
    def disturbed(self) -> bool:
        """Did the rest of the machine take enough to show in the figures?"""
        return self.others is not None and self.others > DISTURBING_CPUS

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "workload": asdict(self.cell.workload),
            "concurrency": self.cell.concurrency,
            "arrivals": asdict(self.cell.arrivals) if self.cell.arrivals else None,
            "seed": self.cell.seed,
            "others_cpus": None if self.others is None else round(self.others, 3),
            **asdict(self.summary),
        }


def measured_table(results: Sequence[Measured]) -> str:
    """One line a cell; percentiles as p50 / p99."""
    heads = ["workload", "load", "requests", "tok/s", "TTFT ms", "TPOT ms", "ITL ms", "E2E ms"]
    with_goodput = any(one.summary.goodput_rps is not None for one in results)
    rows = [heads + ["goodput/s"] * with_goodput]
    for one in results:
        summary = one.summary
        row = [one.cell.workload.name, one.cell.load, f"{summary.completed}/{summary.requests}"]
        row.append(f"{summary.output_tok_s:.1f}")
        spreads = (summary.ttft_ms, summary.tpot_ms, summary.itl_ms, summary.e2e_ms)
        row += [_two(spread) for spread in spreads]
        if with_goodput:
            row.append(f"{summary.goodput_rps or 0:.2f} ({summary.good_share or 0:.0%})")
        rows.append(row)
    return align(rows) + "\n" + notes(results)


def notes(results: Sequence[Measured]) -> str:
    """What a reader must know about the table: failures, wrong lengths; empty when all is well."""
    lines = ["times: p50 / p99"]
    for one in results:
        name = f"{one.cell.workload.name} {one.cell.load}"
        lines += [f"{name}: {count} × {text}" for text, count in one.summary.errors]
        if one.summary.off_length:
            lines.append(
                f"{name}: {one.summary.off_length} outputs had not the length asked for "
                "(the endpoint ended them early)"
            )
    return "\n".join(lines)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of even width: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same rows as a Markdown table."""
    head, *body = rows
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a result with the date and the machine beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"date": date, "machine": machine(), **record}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def machine() -> str:
    """CPU, cores and the instructions that matter: `Intel(R) Xeon(R), 2 cores, amx_bf16 ...`."""
    cpu, flags = platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                cpu = value.strip()
            elif name.strip() == "flags":
                flags = value
    except OSError:
        pass  # not Linux: the architecture will do
    has = [feature for feature in CPU_FEATURES if feature in flags.split()]
    return ", ".join([cpu, f"{os.cpu_count()} cores", " ".join(has) or "no known features"])


def _two(spread: Spread | None) -> str:
    return f"{_short(spread.p50)} / {_short(spread.p99)}" if spread else "-"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
