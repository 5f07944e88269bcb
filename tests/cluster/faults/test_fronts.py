"""An HTTP process is killed under its streams: its lease runs out and engines free its work."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import pytest
from kit.fabric_server import FabricServer, eventually, serving
from kit.fault_harness import AT_REST, Stream, read
from kit.tiny_models import make_tiny_model

from fabric.cluster.app import INGRESS

CONFIG = """\
model: {name: m, threads: 1}
kv: {device_bytes: 134217728, host_bytes: 0}
engine: {max_sequences: 8}
server: {ingress_replicas: 2}
"""
STREAMS = 8


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_killed_front_breaks_its_streams_and_its_work_is_freed(tmp_path: Path) -> None:
    """Its clients see the end of the connection, not of the answer; others get all of theirs."""
    # Large enough for streams that outlast a lease by far.
    wide = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
    model = make_tiny_model(tmp_path / "model", max_position_embeddings=1024, **wide)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    with serving(tmp_path, str(model), "--config", str(config)) as server:
        eventually(lambda: server.gauge("fabric_ingresses") == 2, within_s=60)
        undisturbed = Stream()
        read(server, body(), undisturbed)
        found = [Stream() for _ in range(STREAMS)]
        with ThreadPoolExecutor(STREAMS) as pool:
            readers = [pool.submit(read_what_comes, server, one) for one in found]
            eventually(lambda: all(one.letters for one in found), within_s=60)
            killed = fronts(server)[0]
            os.kill(killed, signal.SIGKILL)
            broken = check_that_work_is_freed(server, readers, found)
        whole = [one for one in found if one.finish]
        assert len(whole) == STREAMS - broken
        assert all(one == undisturbed for one in whole), "a stream of the other front was hurt"
        eventually(lambda: killed not in fronts(server) and len(fronts(server)) == 2, within_s=120)
        eventually(lambda: server.get("/ready").status == 200, within_s=60)
        again = Stream()
        read(server, body(), again)
        assert again == undisturbed
        server.processes()


def check_that_work_is_freed(
    server: FabricServer, readers: list[Future[None]], found: list[Stream]
) -> int:
    """How many streams broke: exactly those are aborted, and every block is free."""
    for reader in readers:
        reader.result()
    broken = sum(not one.finish for one in found)
    assert broken, "nobody was served by the front that died"
    eventually(lambda: server.gauge("fabric_choices_aborted_total") == broken)
    eventually(lambda: not any(server.gauge(name) for name in AT_REST))
    assert server.gauge("fabric_kv_blocks_free") == server.gauge("fabric_kv_blocks") > 0
    return broken


def body() -> dict[str, object]:
    return {
        "model": "m",
        "prompt": "hello world",
        "max_tokens": 600,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def read_what_comes(server: FabricServer, found: Stream) -> None:
    """To the end of the answer or of the connection."""
    with suppress(OSError, HTTPException):
        read(server, body(), found)


def fronts(server: FabricServer) -> list[int]:
    """Process ids of the HTTP fronts."""
    record = server.get("/fabric/status").json()
    return sorted(one["pid"] for one in record["processes"] if f":{INGRESS}" in one["name"])
