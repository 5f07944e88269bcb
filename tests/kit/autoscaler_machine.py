"""`Autoscaler` under any load, against what it promises."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kit.pool_model import NS_PER_S, PoolModel

from fabric.core.configs import AutoscalerConfig
from fabric.core.control.autoscaler import Signal, Target


class AutoscalerMachine(RuleBasedStateMachine):
    """The model knows when there was work, when something changed, and what would have done."""

    @initialize(
        least=st.integers(0, 2),
        more=st.integers(0, 8),
        idle=st.booleans(),
        budget=st.none() | st.integers(2, 6),
    )
    def build(self, least: int, more: int, idle: bool, budget: int | None) -> None:
        most = max(1, least + more)
        self.config = AutoscalerConfig(
            min_replicas=least,
            max_replicas=most,
            idle_s=20.0 if idle else None,
            hold_s=15.0,
            hold_max_s=60.0,
            cooldown_s=20.0,
            gpus=1,
            gpu_budget=budget,
        )
        self.most = most if budget is None else min(most, budget)
        self.pool = PoolModel(self.config, replicas=max(1, least))
        self.worked = 0
        self.changed = 0
        self.pressed: int | None = None
        self.wishes: list[tuple[int, int]] = []

    @rule(work=st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9, 2.0, 5.0]), seconds=st.integers(1, 12))
    def work(self, work: float, seconds: int) -> None:
        for _ in range(seconds):
            self.tick(work)

    @rule(burn=st.sampled_from([0.0, 0.5, 3.0]))
    def burn(self, burn: float) -> None:
        self.pool.burn = burn

    def tick(self, work: float) -> None:
        before = self.pool.wanted
        hold_s = self.pool.autoscaler.hold_s
        queued = self.pool.backlog
        target = self.pool.tick(work)
        now = self.pool.now // NS_PER_S
        if work or queued or self.pool.backlog >= 50:
            self.worked = now
        self.wishes.append((now, self.pool.autoscaler._load.fewer()))
        self.judge(target, before, hold_s, now)
        if target.replicas != before:
            self.changed = now

    def judge(self, target: Target, before: int, hold_s: float, now: int) -> None:
        assert target.why, "a decision without a reason"
        assert self.config.min_replicas <= target.replicas <= self.most, "beyond the limits"
        if target.replicas == 0 and before:
            assert target.signal is Signal.IDLE, "to zero, and not idle"
            assert self.config.idle_s is not None, "zero is not allowed"
            assert now - self.worked >= self.config.idle_s - 2, "to zero with work at hand"
        elif target.replicas < before <= self.most:
            assert now - self.changed >= hold_s or not self.changed, "down too soon after a change"
            recent = [wish for when, wish in self.wishes if when >= now - hold_s]
            assert target.replicas >= min(max(recent), self.most), "fewer than was needed just now"
        if target.signal is Signal.MISSED and target.replicas > before:
            assert self.pool.burn >= 1, "nothing is missed"
            if self.pressed is not None:
                assert now - self.pressed >= self.config.cooldown_s, "pressed twice"
            self.pressed = now

    @invariant()
    def exact(self) -> None:
        if hasattr(self, "pool"):
            self.pool.autoscaler.check()
