"""`Ledger` against a list of all that ever happened."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from fabric.core.attainment import Dimension, Outcome, Series
from fabric.core.control.slo import Ledger
from fabric.core.sketch import RELATIVE_ERROR
from fabric.core.tiers import Tier

NS_PER_S = 1_000_000_000
TIERS = (
    Tier(name="fast", ttft_ms=500, tpot_ms=50),
    Tier(name="slow", ttft_ms=5_000, tpot_ms=500),
)
TIMES = st.sampled_from([0.0, 0.04, 0.05, 0.051, 0.4, 0.5, 0.501, 4.0, 5.0, 5.1])


class LedgerMachine(RuleBasedStateMachine):
    """Two dispatchers with a ledger each; what they say together is compared."""

    @initialize()
    def build(self) -> None:
        self.ledgers = [Ledger(TIERS, objective=0.9) for _ in range(2)]
        self.happened: list[tuple[int, Outcome, bool]] = []
        self.now = 1_700_000_000 * NS_PER_S

    @rule(
        where=st.integers(0, 1),
        tier=st.sampled_from(TIERS),
        tenant=st.sampled_from(["", "a"]),
        adapter=st.none() | st.just("x"),
        times=st.tuples(TIMES, st.none() | TIMES, st.none() | TIMES),
        kept=st.booleans(),
        refused=st.booleans(),
    )
    def observe(self, where: int, tier: Tier, times: tuple[float, float | None, float | None],
                tenant: str, adapter: str | None, **flags: bool) -> None:  # fmt: skip
        wait, ttft, tpot = times
        outcome = Outcome(
            tier=tier.name,
            tenant=tenant,
            version="v1",
            adapter=adapter,
            queue_wait_s=wait,
            ttft_s=None if flags["refused"] else ttft,
            tpot_s=tpot,
            e2e_s=ttft,
            tokens=7,
            deadline_kept=flags["kept"],
            refused=flags["refused"],
        )
        first = outcome.ttft_s
        met = (
            first is not None
            and first <= tier.ttft_ms / 1000
            and (tpot is None or tpot <= tier.tpot_ms / 1000)
            and flags["kept"]
        )
        assert self.ledgers[where].observe(outcome, self.now) == met, "met or not"
        self.happened.append((self.now, outcome, met))

    @rule(passed_s=st.sampled_from([1, 4, 5, 30, 59, 61, 300, 601]))
    def wait(self, passed_s: int) -> None:
        self.now += passed_s * NS_PER_S

    @rule()
    def look(self) -> None:
        pages = [ledger.page(self.now) for ledger in self.ledgers]
        for ledger in self.ledgers:
            ledger.check()
        snapshot = self.ledgers[0].snapshot(pages, self.now)
        assert snapshot == self.ledgers[1].snapshot(pages[::-1], self.now), "order of pages"
        seen = set()
        for one in snapshot.series:
            seen.add((one.dimension, one.name))
            mine = [item for item in self.happened if named(one, item[1])]
            self._window(one, mine)
            self._ttft(one, mine)
        lately = [
            o for t, o, _ in self.happened if self._slice(t, 5) > self._slice(self.now, 5) - 120
        ]
        for outcome in lately:
            assert (Dimension.TIER, outcome.tier) in seen, "forgotten too soon"

    def _window(self, one: Series, mine: list[tuple[int, Outcome, bool]]) -> None:
        for window, slices in ((one.minute, 12), (one.ten_minutes, 120)):
            since = self._slice(self.now, 5) - slices
            inside = [(o, met) for t, o, met in mine if self._slice(t, 5) > since]
            good = sum(met for _, met in inside)
            assert (window.requests, window.met) == (len(inside), good), "counts"
            assert window.refused == sum(o.refused for o, _ in inside), "refused"
            share = good / len(inside) if inside else 1.0
            assert abs(window.attainment - share) < 1e-9
            assert abs(window.burn_rate - (1 - share) / (1 - 0.9)) < 1e-9
            assert abs(window.good_tokens_per_s - 7 * good / window.seconds) < 1e-9

    def _ttft(self, one: Series, mine: Iterable[tuple[int, Outcome, bool]]) -> None:
        since = self._slice(self.now, 60) - 10
        values = sorted(
            o.ttft_s for t, o, _ in mine if self._slice(t, 60) > since and o.ttft_s is not None
        )
        assert one.ttft.count == len(values), "sketched"
        if values:
            true = values[int(0.9 * (len(values) - 1))]
            assert abs(one.ttft.p90 - true) <= (RELATIVE_ERROR + 1e-9) * true

    def _slice(self, at: int, seconds: int) -> int:
        return at // (seconds * NS_PER_S)


def named(one: Series, outcome: Outcome) -> bool:
    """Does the series count this outcome?"""
    name = {
        Dimension.TIER: outcome.tier,
        Dimension.TENANT: outcome.tenant,
        Dimension.VERSION: outcome.version,
        Dimension.ADAPTER: outcome.adapter or "",
    }[one.dimension]
    return name == one.name
