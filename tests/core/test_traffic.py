"""Admission and router: the numbers that the state machines do not pin down."""

from __future__ import annotations

import pytest
from kit.traffic_machines import NS_PER_S, request_of

from fabric.core.configs import AdmissionConfig
from fabric.core.tiers import Tier
from fabric.core.traffic.admission import Admission, Admitted, Shed
from fabric.core.traffic.speed import DrainRate


def test_retry_after_is_the_time_to_drain_at_the_measured_rate() -> None:
    only = (Tier(name="standard", ttft_ms=1_000, tpot_ms=100),)  # nothing is held back for others
    admission = Admission(AdmissionConfig(max_queued_tokens=3000, tiers=only))
    for number in range(40):  # 100 tokens every 0.1 s: 1,000 tokens a second
        assert isinstance(admission.offer(request_of(number, 100, 0), 0), Admitted)
        taken = admission.take(f"r{number}", 0)
        admission.completed(taken, number * NS_PER_S // 10, tokens=1, finished=True)
    for number in range(40, 43):
        admission.offer(request_of(number, 1000, 0), 0)
    shed = admission.offer(request_of(99, 1, 0), 4 * NS_PER_S)
    assert isinstance(shed, Shed)
    assert shed.retry_after_s == pytest.approx(3.0, rel=0.05)


def test_retry_after_without_a_measurement_and_at_its_bounds() -> None:
    admission = Admission(AdmissionConfig(max_queued_requests=1, queue_ttl_s=20.0))
    for number in range(1, 3):
        admission.offer(request_of(number, 100_000, 0), 0)
        admission.take(f"r{number}", 0)
    admission.offer(request_of(0, 1, 0), 0)
    assert admission.retry_after_s(0) == 5.0
    for number in range(1, 3):
        done = request_of(number, 100_000, 0)
        admission.completed(done, number * NS_PER_S, tokens=1, finished=True)
    assert admission.retry_after_s(2 * NS_PER_S) == 1.0
    assert admission.retry_after_s(10_000 * NS_PER_S) == 20.0  # nothing completes any more


def test_the_drain_rate_is_right_from_the_start_and_follows_a_change() -> None:
    rate = DrainRate()
    for second in range(4):
        rate.add(50, second * NS_PER_S)
    assert rate.per_s(3 * NS_PER_S) == pytest.approx(50, rel=0.1)
    for second in range(4, 60):
        rate.add(500, second * NS_PER_S)
    assert rate.per_s(59 * NS_PER_S) == pytest.approx(500, rel=0.1)


def test_a_request_longer_than_the_bound_is_taken_when_alone() -> None:
    admission = Admission(AdmissionConfig(max_queued_tokens=10))
    assert isinstance(admission.offer(request_of(0, 50, 0), 0), Admitted)
    assert isinstance(admission.offer(request_of(1, 1, 0), 0), Shed)


def test_an_id_can_wait_only_once() -> None:
    admission = Admission(AdmissionConfig())
    admission.offer(request_of(0, 1, 0), 0)
    with pytest.raises(ValueError, match="queued already"):
        admission.offer(request_of(0, 1, 0), 0)
