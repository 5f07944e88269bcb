"""`Ladder` against the sentences of its docstring."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from fabric.core.attainment import Dimension, Quantiles, Series, SloSnapshot, Window
from fabric.core.configs import DegradeConfig, Rung, RungKind
from fabric.core.control.degrade import Ladder
from fabric.core.tiers import BUILT_IN

NS_PER_S = 1_000_000_000
RUNGS = (
    Rung(kind=RungKind.DRAFT, amount=0),
    Rung(kind=RungKind.CAP, amount=32),
    Rung(kind=RungKind.CHEAPER, tier="standard", version="small"),
    Rung(kind=RungKind.SHED, tier="batch"),
    Rung(kind=RungKind.SHED, tier="standard"),
)
PROTECTED = (3, 2, 1, 2, 1)  # how many tiers, from the top
BURNS = st.sampled_from([0.0, 0.5, 1.0, 5.0, 10.0, 50.0])


def series(name: str, burn: float, *, requests: int = 50, ten: float | None = None) -> Series:
    """A tier that burns like this."""
    nothing = Quantiles()
    return Series(
        dimension=Dimension.TIER,
        name=name,
        minute=Window(seconds=60, requests=requests, burn_rate=burn, attainment=1 - burn / 100),
        ten_minutes=Window(seconds=600, requests=requests, burn_rate=burn if ten is None else ten),
        queue_wait=nothing,
        ttft=nothing,
        tpot=nothing,
        e2e=nothing,
    )


class LadderMachine(RuleBasedStateMachine):
    """Time passes under burn rates that change; the model keeps the two timers."""

    @initialize()
    def build(self) -> None:
        self.ladder = Ladder(DegradeConfig(rungs=RUNGS), BUILT_IN)
        self.level = 0
        self.hot = self.cool = -1
        self.now = 0

    @rule(
        burns=st.tuples(BURNS, BURNS, BURNS),
        turns=st.sampled_from([1, 2, 3, 13]),
        few=st.sampled_from([False, False, False, True]),
        fresh=st.sampled_from([False, False, False, True]),
    )
    def live(self, burns: tuple[float, ...], turns: int, few: bool, fresh: bool) -> None:
        slo = SloSnapshot(
            taken=self.now,
            series=tuple(
                series(tier.name, burn, requests=5 if few else 50, ten=0.5 if fresh else None)
                for tier, burn in zip(BUILT_IN, burns, strict=True)
            ),
        )
        for _ in range(turns):
            self.now += 5 * NS_PER_S
            before = self.level
            self._model(burns, few, fresh)
            found = self.ladder.decide(slo, self.now)
            self.ladder.check()
            assert self.ladder.level == self.level, "hysteresis"
            assert abs(self.level - before) <= 1, "one rung at a time"
            assert (found.draft_tokens == 0) == (self.level >= 1)
            assert (found.batch_max_tokens == 32) == (self.level >= 2)
            assert (found.cheaper_version == "small") == (self.level >= 3)
            assert found.sheds == ("batch", "standard")[: max(0, self.level - 3)]
            assert bool(found.why) == (self.level > 0), "a reason in words"

    def _model(self, burns: tuple[float, ...], few: bool, fresh: bool) -> None:
        up = self.level < 5 and any(b >= 10 for b in burns[: PROTECTED[self.level]])
        up = up and not few and not fresh
        down = self.level > 0 and all(b < 1 for b in burns[: PROTECTED[self.level - 1]])
        self.hot = (self.hot if self.hot >= 0 else self.now) if up else -1
        self.cool = (self.cool if self.cool >= 0 else self.now) if down else -1
        if self.hot >= 0 and self.now - self.hot >= 10 * NS_PER_S:
            self.level, self.hot, self.cool = self.level + 1, -1, -1
        elif self.cool >= 0 and self.now - self.cool >= 60 * NS_PER_S:
            self.level, self.hot, self.cool = self.level - 1, -1, -1
