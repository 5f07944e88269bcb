"""Tiers and tenants behind two HTTP fronts: headers, shares, limits, the ledger."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kit.fabric_server import Answer, FabricServer, eventually

from fabric.cluster.status import render

KEYS = ("plain-key", "shop-key", "night-key", "trial-key")


def complete(fleet: FabricServer, key: str, fields: object = None, **headers: str) -> Answer:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    extra = fields if isinstance(fields, dict) else {}
    return fleet.post("/v1/completions", body | extra, authorization=f"Bearer {key}", **named)


def names_of(fleet: FabricServer) -> set[str]:
    """Tiers, tenants and versions that the status tells of."""
    record = fleet.get("/fabric/status").json()
    return {one["name"] for one in record["slo"]["series"]}


def test_the_answer_says_the_tier_that_the_key_allows(fleet: FabricServer) -> None:
    for key, asked, header, said in (
        ("plain-key", None, "standard", None),
        ("plain-key", "priority", "interactive", "priority"),
        ("shop-key", "auto", "interactive", "priority"),
        ("night-key", "priority", "batch", "flex"),
    ):
        answer = complete(fleet, key, {"service_tier": asked} if asked else {})
        assert answer.status == 200, answer.text
        assert answer.headers["x-fabric-tier"] == header
        assert answer.json().get("service_tier") == said
        assert "x-fabric-degraded" not in answer.headers
    assert complete(fleet, "nobodys-key").status == 401
    wrong = complete(fleet, "plain-key", x_fabric_deadline_ms="soon")
    assert (wrong.status, wrong.json()["error"]["param"]) == (400, "x-fabric-deadline-ms")


def test_a_limit_is_one_limit_for_both_fronts(fleet: FabricServer) -> None:
    """12 a minute, 2 at once: the fronts share it by leases, however requests are spread."""
    eventually(lambda: complete(fleet, "trial-key").status == 200, within_s=60)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(fleet, "trial-key"), range(24)))
    good = [one for one in answers if one.status == 200]
    shed = [one for one in answers if one.status == 429]
    assert len(good) + len(shed) == 24
    # Two at once; what the burst itself takes to be answered may give a few more.
    assert len(good) <= 8
    assert all(1 <= int(one.headers["retry-after"]) <= 60 for one in shed)
    assert "limit" in shed[0].json()["error"]["message"]
    assert complete(fleet, "shop-key").status == 200, "nobody else's"


def test_the_ledger_of_both_fronts_is_in_metrics_and_status(fleet: FabricServer) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: complete(fleet, "shop-key"), range(16)))
    assert {one.status for one in answers} == {200}
    series = 'fabric_slo_requests{by="tenant",name="shop",window="10m"}'
    eventually(lambda: fleet.metrics().get(series, 0) >= 16)
    metrics = fleet.metrics()
    assert metrics['fabric_slo_attainment{by="tier",name="interactive",window="10m"}'] > 0
    assert metrics['fabric_slo_ttft_seconds{by="tenant",name="shop",quantile="0.5"}'] > 0
    assert metrics["fabric_degraded_level"] == 0
    with pytest.raises(AssertionError):
        fleet.gauge("fabric_no_such_series")
    # What another front has seen comes with heartbeats, and is missing while one is late.
    eventually(lambda: names_of(fleet) >= {"interactive", "shop", "batch"})
    answer = fleet.get("/fabric/status")
    shown = render(answer.json())
    assert "shop" in shown
    assert "met 10 min" in shown
    everything = answer.text + fleet.get("/metrics").text + fleet.output
    assert not any(key in everything for key in KEYS)
    for log in Path(fleet.log).parent.glob("**/*.jsonl"):
        assert not any(key in log.read_text() for key in KEYS)


def test_a_deadline_that_nothing_can_keep_is_refused(fleet: FabricServer) -> None:
    """Learned from what was served before: 400 tokens take longer than a millisecond."""
    answer = complete(fleet, "shop-key", {"max_tokens": 400}, x_fabric_deadline_ms="1")
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) >= 1
