"""Replicas that come and go under real Ray: up, down, to zero, and back for a request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from kit.fabric_server import Answer, FabricServer, eventually, serving
from kit.tiny_models import make_tiny_model

# Large enough for steps of some milliseconds: the engine must be what is busy.
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_utilisation": 0.5,
    "idle_s": 3.0,
    "hold_s": 2.0,
    "horizon_s": 0.0,
}
CONFIG = {
    "autoscaling": SCALING | {"min_replicas": 0},
    # Eight places: eight streams fill a replica.
    "engine": {"max_sequences": 8},
    "model": {"threads": 1},
    "kv": {"device_bytes": 16 << 20, "host_bytes": 0},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FabricServer]:
    folder = tmp_path_factory.mktemp("autoscaling")
    model = make_tiny_model(folder / "model", **LARGE)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    with serving(folder, str(model), "--config", str(config)) as one:
        yield one


def record(server: FabricServer) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/fabric/status").json()
    return found


def changes(server: FabricServer, pool: str) -> list[dict[str, Any]]:
    """What a pool's autoscaler did so far."""
    (mine,) = [one for one in record(server)["scaling"] if one["pool"] == pool]
    found: list[dict[str, Any]] = mine["changes"]
    return found


def there(server: FabricServer) -> int:
    return sum(value for series, value in server.metrics().items() if series == "fabric_replicas")


def short(_number: int) -> dict[str, Any]:
    """A request that an engine is busy with for its output."""
    return {"prompt": [5] * 16, "max_tokens": 100}


def long(number: int) -> dict[str, Any]:
    """One with a prompt that nobody holds."""
    return {"prompt": [3 + number % 300, 3 + number // 300] + [5] * 698, "max_tokens": 2}


class Load:
    """So many streams, one request after the other on each, until it is stopped."""

    def __init__(
        self,
        server: FabricServer,
        streams: int,
        kind: Callable[[int], dict[str, Any]] = short,
    ) -> None:
        self.answers: list[Answer] = []
        self._server = server
        self._kind = kind
        self._numbers = count()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(streams)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[Answer]:
        """Wait for what is open; every answer there was."""
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        return self.answers

    def _run(self) -> None:
        while not self._stop.is_set():
            body = self._kind(next(self._numbers)) | {"ignore_eos": True, "temperature": 0}
            self.answers.append(self._server.post("/v1/completions", body))


@pytest.mark.timeout(240)
def test_up_under_load_down_to_zero_and_back_for_a_request(server: FabricServer) -> None:
    load = Load(server, streams=14)
    try:
        eventually(lambda: there(server) == 2, within_s=90)
        eventually(lambda: len(load.answers) > 20, within_s=60)
    finally:
        answers = load.stop()
    assert {one.status for one in answers} == {200}, "a request was lost"
    assert len({one.json()["choices"][0]["text"] for one in answers}) == 1, "another answer"
    ups = [one for one in changes(server, "mixed") if one["after"] > one["before"]]
    assert (ups[0]["before"], ups[0]["after"]) == (1, 2)
    assert ups[0]["why"]

    # A front that misses a heartbeat on a busy machine shows no replica a moment too early.
    eventually(
        lambda: there(server) == 0 and server.gauge("fabric_replicas_wanted") == 0, within_s=90
    )
    status = record(server)
    assert (status["ready"], status["replicas"]) == (True, [])
    (pool,) = status["scaling"]
    assert (pool["pool"], pool["wanted"]) == ("mixed", 0)
    assert pool["why"] == "nothing to do for 3 s"
    assert server.get("/ready").status == 200
    assert server.gauge("fabric_replicas_wanted") == 0
    assert server.metrics()['fabric_scaling_changes_total{pool="mixed",reason="idle"}'] >= 1

    woken = [Load(server, streams=1) for _ in range(5)]  # all at once, and one wakes it
    found = [one for load in woken for one in load.stop()]
    assert {one.status for one in found} == {200}
    assert {one.json()["choices"][0]["text"] for one in found} == {
        answers[0].json()["choices"][0]["text"]
    }
    assert there(server) == 1


POOLS = {
    "prefill": {"chunk_tokens": 128, "autoscaling": SCALING},
    "decode": {"autoscaling": SCALING},
    "min_prompt_tokens": 64,
}
# Blocks for prompts on their way are few of all, and nobody misses a target, however busy the
# machine: each pool goes by its own load.
ROOM = {"device_bytes": 128 << 20, "host_bytes": 0}
PATIENT = [
    {"name": name, "ttft_ms": 600_000, "tpot_ms": 60_000}
    for name in ("interactive", "standard", "batch")
]


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_each_pool_follows_its_own_load(tmp_path: Path) -> None:
    """Long prompts of two tokens fill one pool, short ones of many tokens the other."""
    model = make_tiny_model(tmp_path / "model", max_position_embeddings=1024, **LARGE)
    config = tmp_path / "config.yaml"
    both = {"engine": CONFIG["engine"], "model": CONFIG["model"]}
    config.write_text(yaml.safe_dump(both | {"pools": POOLS, "kv": ROOM, "tiers": PATIENT}))
    with serving(tmp_path, str(model), "--config", str(config)) as server:
        assert (wanted(server, "prefill"), wanted(server, "decode")) == (1, 1)
        grows(server, "prefill", long)
        assert not changes(server, "decode")
        eventually(lambda: wanted(server, "prefill") == 1 and there(server) == 2, within_s=90)
        grows(server, "decode", short)
        assert len(changes(server, "prefill")) == 2, "up and down once"
        eventually(lambda: wanted(server, "decode") == 1 and there(server) == 2, within_s=90)
        for pool in ("prefill", "decode"):
            up, down = changes(server, pool)
            assert (up["before"], up["after"], down["after"]) == (1, 2, 1)
            assert up["why"]
            assert "have been enough" in down["why"]
        server.processes()


def grows(server: FabricServer, pool: str, kind: Callable[[int], dict[str, Any]]) -> None:
    """Under so much of one kind the pool gets a second replica; all are answered."""
    load = Load(server, 14, kind)
    try:
        eventually(lambda: wanted(server, pool) == 2 and there(server) == 3, within_s=120)
    finally:
        answers = load.stop()
    assert {one.status for one in answers} == {200}, "a request was lost"
    wanted_tokens = kind(0)["max_tokens"]
    assert {one.json()["usage"]["completion_tokens"] for one in answers} == {wanted_tokens}


def wanted(server: FabricServer, pool: str) -> float:
    return server.metrics()[f'fabric_replicas_wanted{{pool="{pool}"}}']
