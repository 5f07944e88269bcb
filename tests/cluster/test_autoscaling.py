"""Replicas that come and go under real Ray: up, down, to zero, and back for a request."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from kit.fabric_server import Answer, FabricServer, eventually, serving
from kit.tiny_models import make_tiny_model

CONFIG = {
    "autoscaling": {
        "min_replicas": 0,
        "max_replicas": 2,
        "target_utilisation": 0.5,
        "idle_s": 5.0,
        "hold_s": 4.0,
        "horizon_s": 0.0,
    },
    # Eight places: eight streams fill a replica.
    "engine": {"max_sequences": 8},
    "model": {"threads": 1},
    "kv": {"device_bytes": 16 << 20, "host_bytes": 0},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FabricServer]:
    folder = tmp_path_factory.mktemp("autoscaling")
    # Large enough for steps of some milliseconds: the engine must be what is busy.
    model = make_tiny_model(
        folder / "model", hidden_size=512, intermediate_size=1536, num_hidden_layers=12
    )
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    with serving(folder, str(model), "--config", str(config)) as one:
        yield one


def scaling(server: FabricServer) -> dict[str, Any]:
    record: dict[str, Any] = server.get("/fabric/status").json()
    return record


def there(server: FabricServer) -> int:
    return sum(value for series, value in server.metrics().items() if series == "fabric_replicas")


class Load:
    """So many streams, one request after the other on each, until it is stopped."""

    def __init__(self, server: FabricServer, streams: int) -> None:
        self.answers: list[Answer] = []
        self._server = server
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
        body = {"prompt": [5] * 16, "max_tokens": 100, "ignore_eos": True, "temperature": 0}
        while not self._stop.is_set():
            self.answers.append(self._server.post("/v1/completions", body))


@pytest.mark.timeout(240)
def test_up_under_load_down_to_zero_and_back_for_a_request(server: FabricServer) -> None:
    load = Load(server, streams=14)
    try:
        eventually(lambda: there(server) == 2, within_s=90)
        eventually(lambda: len(load.answers) > 40, within_s=60)
    finally:
        answers = load.stop()
    assert {one.status for one in answers} == {200}, "a request was lost"
    assert len({one.json()["choices"][0]["text"] for one in answers}) == 1, "another answer"
    ups = [one for one in scaling(server)["scaling"]["changes"] if one["after"] > one["before"]]
    assert (ups[0]["before"], ups[0]["after"]) == (1, 2)
    assert ups[0]["why"]

    # A front that misses a heartbeat on a busy machine shows no replica a moment too early.
    eventually(
        lambda: there(server) == 0 and server.gauge("fabric_replicas_wanted") == 0, within_s=90
    )
    status = scaling(server)
    assert (status["ready"], status["replicas"]) == (True, [])
    assert status["scaling"]["wanted"] == 0
    assert status["scaling"]["why"] == "nothing to do for 5 s"
    assert server.get("/ready").status == 200
    assert server.gauge("fabric_replicas_wanted") == 0
    assert server.metrics()['fabric_scaling_changes_total{reason="idle"}'] >= 1

    woken = [Load(server, streams=1) for _ in range(5)]  # all at once, and one wakes it
    found = [one for load in woken for one in load.stop()]
    assert {one.status for one in found} == {200}
    assert {one.json()["choices"][0]["text"] for one in found} == {
        answers[0].json()["choices"][0]["text"]
    }
    assert there(server) == 1
