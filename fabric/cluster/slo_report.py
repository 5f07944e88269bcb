"""The SLO in text: Prometheus series by tier, tenant, version and adapter; rows for `status`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fabric.cluster.reports import DispatcherReport
from fabric.core.attainment import Quantiles, Series, SloSnapshot

LATENCIES = ("queue_wait", "ttft", "tpot", "e2e")
GAUGES = (
    ("attainment", "Share of requests that met their targets."),
    ("burn_rate", "Error budget's burn rate; 1 uses it up exactly."),
    ("goodput_per_s", "Requests a second that met their targets."),
    ("requests", "Requests that ended, those refused for want of capacity too."),
    ("refused", "Of these, refused."),
)


def slo_text(slo: SloSnapshot, fronts: Sequence[DispatcherReport]) -> str:
    """Prometheus text of all dispatchers together; windows of one and ten minutes."""
    lines: list[str] = []
    for name, text in GAUGES:
        lines += _head(f"fabric_slo_{name}", text, "gauge")
        for one in slo.series:
            for label, window in (("1m", one.minute), ("10m", one.ten_minutes)):
                value = getattr(window, name)
                lines.append(f'fabric_slo_{name}{{{_labels(one)},window="{label}"}} {value:.9g}')
    for name in LATENCIES:
        series = f"fabric_slo_{name}_seconds"
        lines += _head(series, "Over ten minutes.", "summary")
        for one in slo.series:
            lines += _summary(series, _labels(one), getattr(one, name))
    lines += _head("fabric_degraded_level", "The degrade ladder's level.", "gauge")
    lines.append(f"fabric_degraded_level {max((one.degraded for one in fronts), default=0)}")
    lines += _head("fabric_degrade_moves_total", "Rungs entered and left.", "counter")
    total: dict[tuple[str, str], int] = {}
    for one_front in fronts:
        for rung, way, times in one_front.moves:
            total[rung, way] = total.get((rung, way), 0) + times
    for (rung, way), times in sorted(total.items()):
        lines.append(f'fabric_degrade_moves_total{{rung="{rung}",way="{way}"}} {times}')
    return "\n".join(lines) + "\n"


def slo_status(slo: SloSnapshot, degraded: str) -> dict[str, object]:
    """JSON-able. `degraded`: why something is done without; empty: nothing is."""
    return {"degraded": degraded, "series": [_row(one) for one in slo.series]}


def _row(one: Series) -> dict[str, object]:
    return {
        "dimension": one.dimension.value,
        "name": one.name,
        "requests": one.ten_minutes.requests,
        "refused": one.ten_minutes.refused,
        "attainment_minute": one.minute.attainment,
        "attainment": one.ten_minutes.attainment,
        "burn_rate_minute": one.minute.burn_rate,
        "burn_rate": one.ten_minutes.burn_rate,
        "goodput_per_s": one.minute.goodput_per_s,
        **{
            f"{name}_ms_{quantile}": 1000 * getattr(getattr(one, name), quantile)
            for name in LATENCIES
            for quantile in ("p50", "p99")
        },
    }


def _head(name: str, text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _summary(series: str, labels: str, found: Quantiles) -> Iterator[str]:
    for quantile, value in (("0.5", found.p50), ("0.9", found.p90), ("0.99", found.p99)):
        yield f'{series}{{{labels},quantile="{quantile}"}} {value:.6g}'
    yield f"{series}_sum{{{labels}}} {found.total:.9g}"
    yield f"{series}_count{{{labels}}} {found.count}"


def _labels(one: Series) -> str:
    name = one.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'by="{one.dimension.value}",name="{name}"'
