"""A run, or several side by side, as one HTML file that needs nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from html import escape

from fabric.sim.clock import NS_PER_MS, NS_PER_S
from fabric.sim.records import Outcome, Sample, Timeline
from fabric.sim.svg import Axes, Series, bars, lines
from fabric.sim.text import Run, figures, spread_text

CDF_POINTS = 200
TIME_POINTS = 400
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c1f23;--dim:#667;--line:#dde;
--c0:#2563eb;--c1:#c2410c;--c2:#15803d;--c3:#9333ea;--c4:#b45309;--c5:#0e7490}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e6e8eb;--dim:#99a;--line:#30353c;
--c0:#7aa2ff;--c1:#fb923c;--c2:#4ade80;--c3:#c084fc;--c4:#fbbf24;--c5:#22d3ee}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;margin:2rem auto;
max-width:1120px;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.15rem;margin-top:2.2rem}.dim{color:var(--dim)}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
td:first-child,th:first-child{text-align:left}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:1rem}
svg{width:100%;height:auto}svg text{fill:var(--dim);font:11px system-ui,sans-serif}
svg .title{fill:var(--fg);font-size:13px}svg .grid{stroke:var(--line)}polyline{stroke-width:1.6}
"""
Figure = Callable[[Timeline], float | None]


def html(runs: Sequence[Run], heading: str) -> str:
    """The page. `heading`: what was simulated, in words."""
    body = [f"<h1>{escape(heading)}</h1>"]
    if any(run.profile.estimate for run in runs):
        body.append('<p class="dim">Step times are a roofline\'s arithmetic, not measured.</p>')
    if len(runs) > 1:
        body += ["<h2>Side by side</h2>", _comparison(runs), _plots(_shared(runs))]
    for run in runs:
        body += [f"<h2>{escape(run.name)}</h2>", _headline(run), _tiers(run)]
        body += [_violations(run), _plots(_own(run))]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = f"<title>{escape(heading)}</title><style>{STYLE}</style>"
    text = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}{title}</head>\n<body>{text}</body></html>\n'
    )


def _plots(found: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(found)}</div>'


def _own(run: Run) -> list[str]:
    """Of one run: a line a tier, then the fleet."""
    outcome = run.outcome
    tiers = [one.tier for one in run.summary.tiers]
    plots = []
    for name, unit, figure in FIGURES:
        series = [Series(name=tier, points=cdf(outcome, figure, tier)) for tier in tiers]
        plots.append(lines(Axes(title=name, x=unit, y="share of requests", y_most=1.0), series))
    plots.append(lines(
        Axes(title="Queue", x="s", y="requests", counts=True),
        [Series(name="waiting", points=_over_time(outcome, _queued))],
    ))  # fmt: skip
    plots.append(lines(
        Axes(title="Replicas", x="s", y="replicas", counts=True),
        [
            Series(name="ready", points=_over_time(outcome, _ready), stepped=True),
            Series(name="starting", points=_over_time(outcome, _starting), stepped=True),
            Series(name="draining", points=_over_time(outcome, _draining), stepped=True),
        ],
    ))  # fmt: skip
    loads = Counter[str]()
    for one in outcome.timelines:
        if one.replica is not None:
            loads[one.replica] += one.prompt_tokens + one.tokens
    axes = Axes(title="Load of each replica", x="replicas", y="tokens")
    plots.append(bars(axes, sorted(loads.items())))
    return plots


def _shared(runs: Sequence[Run]) -> list[str]:
    """Of several: a line a run."""
    plots = []
    for name, unit, figure in FIGURES:
        series = [Series(name=run.name, points=cdf(run.outcome, figure)) for run in runs]
        plots.append(lines(Axes(title=name, x=unit, y="share of requests", y_most=1.0), series))
    for title, of in (("Queue, requests", _queued), ("Ready replicas", _ready)):
        series = [
            Series(name=run.name, points=_over_time(run.outcome, of), stepped=True) for run in runs
        ]
        plots.append(lines(Axes(title=title, x="s", y=title, counts=True), series))
    return plots


def cdf(outcome: Outcome, figure: Figure, tier: str | None = None) -> list[tuple[float, float]]:
    """(value, share of those that have one at or below it), thinned; `tier` None: all."""
    known = sorted(
        value
        for one in outcome.timelines
        if (tier is None or one.request.tier == tier) and (value := figure(one)) is not None
    )
    if not known:
        return []
    count = len(known)
    places = sorted({min(count - 1, count * i // CDF_POINTS) for i in range(CDF_POINTS + 1)})
    return [(known[place], (place + 1) / count) for place in places]


def _over_time(outcome: Outcome, of: Callable[[Sample], int]) -> list[tuple[float, float]]:
    """(second, the most in its stretch): what is thinned out must not hide a peak."""
    samples = outcome.samples
    stretch = -(-len(samples) // TIME_POINTS) or 1
    pieces = [samples[at : at + stretch] for at in range(0, len(samples), stretch)]
    return [(piece[0].at / NS_PER_S, float(max(map(of, piece)))) for piece in pieces]


def _headline(run: Run) -> str:
    one = run.summary
    cost = "" if one.dollars is None else f", ${one.dollars:,.2f} at an assumed price"
    return (
        f"<p>{escape(run.profile.name)}: {one.requests:,} requests in {one.seconds:,.0f} s, "
        f"{one.attained:.2%} within their targets ({one.goodput_per_s:.2f} a second), "
        f"{one.tokens_per_s:,.0f} tokens/s, {one.replica_hours:.3f} replica-hours, "
        f"{one.gpu_hours:.3f} GPU-hours{cost}.</p>"
    )


def _tiers(run: Run) -> str:
    head = ("tier", "requests", "finished", "refused", "preempted", "attained")
    units = ("queue ms", "TTFT ms", "TPOT ms", "E2E ms")
    rows = [[*head, *units]]
    for one in run.summary.tiers:
        counts = (one.requests, one.finished, one.refused, one.preempted)
        spreads = (one.queued_ms, one.ttft_ms, one.tpot_ms, one.e2e_ms)
        rows.append(
            [one.tier, *map(str, counts), f"{one.attained:.1%}", *map(spread_text, spreads)]
        )
    return _table(rows) + '<p class="dim">p50 / p90 / p99</p>'


def _violations(run: Run) -> str:
    found = run.summary.violations
    if not found:
        return "<p>No target was missed.</p>"
    ranked = sorted(found.items(), key=lambda one: (-one[1], one[0]))
    return _table([["missed because of", "requests"], *([why, str(n)] for why, n in ranked)])


def _comparison(runs: Sequence[Run]) -> str:
    rows = [["", *(run.name for run in runs)]]
    rows += [[name, *(f"{v:,.3f}" for v in values)] for name, values in figures(runs).items()]
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines_ = [f"<tr>{cells}</tr>"]
    for row in rest:
        lines_.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines_)}</table>"


def _ttft(one: Timeline) -> float | None:
    return None if one.ttft_ns is None else one.ttft_ns / NS_PER_S


def _tpot(one: Timeline) -> float | None:
    return None if one.tpot_ns is None else one.tpot_ns / NS_PER_MS


def _e2e(one: Timeline) -> float | None:
    return None if one.e2e_ns is None else one.e2e_ns / NS_PER_S


FIGURES: tuple[tuple[str, str, Figure], ...] = (
    ("Time to the first token", "s", _ttft),
    ("Time per output token", "ms", _tpot),
    ("From arrival to the last token", "s", _e2e),
)


def _queued(one: Sample) -> int:
    return one.queued_requests


def _ready(one: Sample) -> int:
    return one.ready


def _starting(one: Sample) -> int:
    return one.starting


def _draining(one: Sample) -> int:
    return one.draining
