"""Tiers and tenants on a real server with two HTTP fronts: headers, shares, limits, the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kit.fabric_server import Answer, FabricServer, eventually, serving
from kit.tiny_models import make_tiny_model

from fabric.cluster.status import render

CONFIG = """
model: {name: tiny}
kv: {device_bytes: 4194304, host_bytes: 1048576}
engine: {max_sequences: 4, step_tokens: 32, chunk_tokens: 32}
server: {ingress_replicas: 2, drain_timeout_s: 5, api_keys: [plain-key]}
tiers:
  - {name: interactive, ttft_ms: 5000, tpot_ms: 1000, weight: 4.0, reserved_share: 0.25}
  - {name: standard, ttft_ms: 20000, tpot_ms: 1000, weight: 2.0}
  - {name: batch, ttft_ms: 60000, tpot_ms: 2000}
tenants:
  - {name: shop, api_keys: [shop-key], default_tier: interactive}
  - {name: night, api_keys: [night-key], default_tier: batch, highest_tier: batch}
  - {name: trial, api_keys: [trial-key], requests_per_minute: 12}
"""
KEYS = ("plain-key", "shop-key", "night-key", "trial-key")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FabricServer]:
    folder: Path = tmp_path_factory.mktemp("tiers")
    model = make_tiny_model(folder / "model", max_position_embeddings=2048)
    (folder / "config.yaml").write_text(CONFIG)
    with serving(folder, str(model), "--config", str(folder / "config.yaml")) as running:
        yield running


def complete(server: FabricServer, key: str, fields: object = None, **headers: str) -> Answer:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    extra = fields if isinstance(fields, dict) else {}
    return server.post("/v1/completions", body | extra, authorization=f"Bearer {key}", **named)


def names_of(server: FabricServer) -> set[str]:
    """Tiers, tenants and versions that the status tells of."""
    record = server.get_with_key("/fabric/status", "plain-key").json()
    return {one["name"] for one in record["slo"]["series"]}


def test_the_answer_says_the_tier_that_the_key_allows(server: FabricServer) -> None:
    for key, asked, header, said in (
        ("plain-key", None, "standard", None),
        ("plain-key", "priority", "interactive", "priority"),
        ("shop-key", "auto", "interactive", "priority"),
        ("night-key", "priority", "batch", "flex"),
    ):
        answer = complete(server, key, {"service_tier": asked} if asked else {})
        assert answer.status == 200, answer.text
        assert answer.headers["x-fabric-tier"] == header
        assert answer.json().get("service_tier") == said
        assert "x-fabric-degraded" not in answer.headers
    assert complete(server, "nobodys-key").status == 401
    wrong = complete(server, "plain-key", x_fabric_deadline_ms="soon")
    assert (wrong.status, wrong.json()["error"]["param"]) == (400, "x-fabric-deadline-ms")


def test_a_limit_is_one_limit_for_both_fronts(server: FabricServer) -> None:
    """12 a minute, 2 at once: the fronts share it by leases, however requests are spread."""
    eventually(lambda: complete(server, "trial-key").status == 200, within_s=60)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: complete(server, "trial-key"), range(24)))
    good = [one for one in answers if one.status == 200]
    shed = [one for one in answers if one.status == 429]
    assert len(good) + len(shed) == 24
    # Two at once; what the burst itself takes to be answered may give a few more.
    assert len(good) <= 8
    assert all(1 <= int(one.headers["retry-after"]) <= 60 for one in shed)
    assert "limit" in shed[0].json()["error"]["message"]
    assert complete(server, "shop-key").status == 200, "nobody else's"


def test_the_ledger_of_both_fronts_is_in_metrics_and_status(server: FabricServer) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: complete(server, "shop-key"), range(16)))
    assert {one.status for one in answers} == {200}
    series = 'fabric_slo_requests{by="tenant",name="shop",window="10m"}'
    eventually(lambda: server.metrics().get(series, 0) >= 16)
    metrics = server.metrics()
    assert metrics['fabric_slo_attainment{by="tier",name="interactive",window="10m"}'] > 0
    assert metrics['fabric_slo_ttft_seconds{by="tenant",name="shop",quantile="0.5"}'] > 0
    assert metrics["fabric_degraded_level"] == 0
    with pytest.raises(AssertionError):
        server.gauge("fabric_no_such_series")
    # What another front has seen comes with heartbeats, and is missing while one is late.
    eventually(lambda: names_of(server) >= {"interactive", "shop", "batch"})
    answer = server.get_with_key("/fabric/status", "plain-key")
    shown = render(answer.json())
    assert "shop" in shown
    assert "met 10 min" in shown
    everything = answer.text + server.get("/metrics").text + server.output
    assert not any(key in everything for key in KEYS)
    for log in Path(server.log).parent.glob("**/*.jsonl"):
        assert not any(key in log.read_text() for key in KEYS)


def test_a_deadline_that_nothing_can_keep_is_refused(server: FabricServer) -> None:
    """Learned from what was served before: 400 tokens take longer than a millisecond."""
    answer = complete(server, "shop-key", {"max_tokens": 400}, x_fabric_deadline_ms="1")
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) >= 1
