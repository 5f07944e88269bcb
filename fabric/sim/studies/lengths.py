"""Study 6: is the estimate of output lengths calibrated on a recorded trace?

Each request is estimated in its turn, from those before it alone, without its own max_tokens.
"""

from __future__ import annotations

from dataclasses import replace

from fabric.core.traffic.lengths import Lengths
from fabric.sim.scenarios.result import Result, Target, head, row
from fabric.sim.studies.study import Recorded

PARTS = 6
MAX_TOKENS = 4096
LOW, HIGH = 0.75, 0.85


def run(seed: str, trace: Recorded | None) -> Result:  # noqa: ARG001
    """The whole trace, and in parts: calibrated all along, not on average."""
    if trace is None:
        raise ValueError("study lengths needs --trace FILE: a recorded trace")
    lengths = Lengths()
    held: list[bool] = []
    for one in trace.requests():
        tokens = one.sampling.max_tokens
        asked = replace(one, sampling=replace(one.sampling, max_tokens=MAX_TOKENS))
        estimate = lengths.estimate(asked)
        held.append(tokens <= estimate.high)
        lengths.observe(asked, tokens)
    lengths.check()
    rows = [head("requests | stay within the 80 % quantile")]
    size = max(1, len(held) // PARTS)
    shares = []
    for begin in range(0, PARTS * size, size):
        part = held[begin : begin + size]
        shares.append(sum(part) / len(part))
        rows.append(row(f"{begin:,} to {begin + len(part):,}", f"{shares[-1]:.1%}"))
    whole = sum(held) / len(held)
    rows.append(row("all", f"{whole:.1%}"))
    return Result(
        rows=tuple(rows),
        targets=(
            Target(
                text="the 80 % quantile of output lengths covers 75 to 85 % of the trace",
                found=f"{whole:.1%}",
                met=LOW <= whole <= HIGH,
            ),
            Target(
                text="and of each sixth of it",
                found=f"{min(shares):.1%} to {max(shares):.1%}",
                met=min(shares) >= LOW and max(shares) <= HIGH,
            ),
        ),
    )
