"""The degrade ladder: what is done without when the SLO burns and more replicas don't come in time.

    0 nothing ── burns for `hold_ns` ──> 1 ──> 2 ──> ... the config's rungs, each on top of those
              <── calm for `recover_ns` ──                    below it

A rung looks only at the tiers that it protects: those above the tier that it takes from (all tiers,
if it takes from nobody: shorter drafts cost no one an answer). It burns when the error budget of
one of them goes faster than `enter_burn` over the last minute and is used up over ten (Google's SRE
workbook, chapter 5: a short window to be quick, a long one not to be nervous). It is calm when all
burn slower than `leave_burn` over the minute. Between the two nothing moves: that, and the two
waiting times, is the hysteresis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fabric.core.attainment import SloSnapshot
from fabric.core.configs import DegradeConfig, Rung, RungKind
from fabric.core.degradation import NOTHING, Degradation
from fabric.core.tiers import Tier


class Ladder:
    """`decide` once a second. `moves`: how often each rung was entered or left, and why."""

    def __init__(self, config: DegradeConfig, tiers: Sequence[Tier]) -> None:
        self.config = config
        self.level = 0
        self.why = ""
        self.moves: dict[tuple[str, str], int] = {}  # (rung, "entered" or "left") -> times
        self._names = [tier.name for tier in tiers]
        for rung in config.rungs:
            if rung.tier is not None and rung.tier not in self._names:
                raise ValueError(f"the ladder names tier {rung.tier!r}; there is none")
        self._burning_since: int | None = None
        self._calm_since: int | None = None

    def decide(self, slo: SloSnapshot, now: int) -> Degradation:
        """What is done without from now on."""
        rungs = self.config.rungs
        burning = self._burning(rungs[self.level], slo) if self.level < len(rungs) else ""
        calm = self.level > 0 and self._calm(rungs[self.level - 1], slo)
        self._burning_since = _since(self._burning_since, bool(burning), now)
        self._calm_since = _since(self._calm_since, calm, now)
        if self._burning_since is not None and self._lasts(
            self._burning_since, self.config.hold_ns, now
        ):
            self._move(rungs[self.level], "entered", burning)
            self.level += 1
        elif self._calm_since is not None and self._lasts(
            self._calm_since, self.config.recover_ns, now
        ):
            self.level -= 1
            self._move(rungs[self.level], "left", "the targets are met again")
        return self.degradation()

    def degradation(self) -> Degradation:
        """Of the rungs up to the level."""
        found = NOTHING
        for rung in self.config.rungs[: self.level]:
            match rung.kind:
                case RungKind.DRAFT:
                    found = replace(found, draft_tokens=rung.amount)
                case RungKind.CAP:
                    found = replace(found, batch_max_tokens=rung.amount)
                case RungKind.CHEAPER:
                    found = replace(found, cheaper_version=rung.version, reroutes=rung.tier or "")
                case RungKind.SHED:
                    assert rung.tier is not None
                    found = replace(found, sheds=(*found.sheds, rung.tier))
        return replace(found, why=self.why) if self.level else found

    def check(self) -> None:
        """The level is one of the config's, and moves account for it."""
        assert 0 <= self.level <= len(self.config.rungs), "no such level"
        ups = sum(times for (_, way), times in self.moves.items() if way == "entered")
        downs = sum(times for (_, way), times in self.moves.items() if way == "left")
        assert ups - downs == self.level, "moved without a count"
        assert self._burning_since is None or self._calm_since is None or self.level, "both"

    def _protected(self, rung: Rung) -> list[str]:
        taken_from = self._names[-1] if rung.kind is RungKind.CAP else rung.tier
        if taken_from is None:
            return self._names
        return self._names[: self._names.index(taken_from)]

    def _burning(self, rung: Rung, slo: SloSnapshot) -> str:
        """Which protected tier burns, in words; empty: none."""
        for name in self._protected(rung):
            one = slo.tier(name)
            if one is None or one.minute.requests < self.config.least_requests:
                continue
            if one.minute.burn_rate >= self.config.enter_burn and one.ten_minutes.burn_rate >= 1:
                met = one.minute.attainment
                return f"{name} meets its targets for {met:.0%} of requests in the last minute"
        return ""

    def _calm(self, rung: Rung, slo: SloSnapshot) -> bool:
        found = [slo.tier(name) for name in self._protected(rung)]
        return all(one is None or one.minute.burn_rate < self.config.leave_burn for one in found)

    def _lasts(self, since: int, wanted: int, now: int) -> bool:
        return now - since >= wanted

    def _move(self, rung: Rung, way: str, why: str) -> None:
        self.why = why
        self.moves[rung.name, way] = self.moves.get((rung.name, way), 0) + 1
        self._burning_since = self._calm_since = None


def _since(since: int | None, holds: bool, now: int) -> int | None:
    if not holds:
        return None
    return now if since is None else since
