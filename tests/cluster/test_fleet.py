"""Two engines and two HTTP fronts on a real Ray, with a tiny model."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kit.fabric_server import Answer, FabricServer, eventually

from fabric.cluster.status import render

LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


def complete(fleet: FabricServer, prompt: object = "hello world", **fields: object) -> Answer:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "ignore_eos": True, **fields}
    return fleet.post("/v1/completions", body)


def test_everything_listens_on_loopback_only(fleet: FabricServer) -> None:
    listening = list(listening_sockets([fleet.process.pid, *(p.pid for p in fleet.processes())]))
    assert any(port == fleet.port for _, port in listening)
    assert len(listening) > 10, "Ray, Serve and HAProxy are among them"
    outside = [
        pair for pair in listening if pair[0] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ]
    assert not outside


def test_both_engines_and_both_fronts_take_part_in_the_metrics(fleet: FabricServer) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda i: complete(fleet, f"hi {i}", max_tokens=300), range(24)))
    assert {one.status for one in answers} == {200}

    def replicas_with_tokens() -> int:
        found = fleet.metrics().items()
        return sum(s.startswith("vllm:generation_tokens_total{") and v > 0 for s, v in found)

    assert replicas_with_tokens() == 2
    # Whichever front answers, it tells the same.
    for _ in range(6):
        eventually(lambda: fleet.gauge("fabric_ingresses") == 2)
        assert fleet.gauge("fabric_replicas") == 2
    eventually(lambda: fleet.gauge("vllm:e2e_request_latency_seconds_count") >= 24)
    eventually(lambda: fleet.gauge("fabric_requests_admitted_total") >= 24)


def test_the_same_seed_gives_the_same_tokens_on_every_engine(fleet: FabricServer) -> None:
    texts = {
        complete(fleet, seed=7, temperature=1.0).json()["choices"][0]["text"] for _ in range(8)
    }
    assert len(texts) == 1


def test_status_shows_replicas_memory_and_queues(fleet: FabricServer) -> None:
    record = fleet.get("/fabric/status").json()
    assert record["ready"]
    assert len(record["replicas"]) == 2
    eventually(lambda: len(fleet.get("/fabric/status").json()["ingresses"]) == 2)
    for replica in record["replicas"]:
        assert replica["kv_pool_bytes"] <= 4 << 20
        assert replica["weight_bytes"] > 0
    names = [process["name"] for process in record["processes"]]
    assert sum("engine" in name for name in names) == 2
    assert all(process["pss_bytes"] > 0 for process in record["processes"])
    table = render(record)
    assert "tiny" in table
    assert "without KV pool and object store" in table


def test_a_full_queue_answers_429_with_a_time(fleet: FabricServer) -> None:
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda i: complete(fleet, max_tokens=1500), range(60)))
    refused = [one for one in answers if one.status == 429]
    assert refused
    assert all(int(one.headers["retry-after"]) >= 1 for one in refused)
    assert all(one.json()["error"]["type"] for one in refused)
    assert {one.status for one in answers} == {200, 429}
    eventually(lambda: idle(fleet))


def test_streams_cancelled_over_http_leave_nothing_behind(fleet: FabricServer) -> None:
    def read_some(number: int) -> None:
        body = json.dumps(
            {
                "model": "tiny",
                "prompt": "hello",
                "max_tokens": 1500,
                "stream": True,
                "ignore_eos": True,
            }
        ).encode()
        with socket.create_connection(("127.0.0.1", fleet.port)) as connection:
            # Closed by the server after a refusal: who is refused has nothing more to read.
            head = (
                "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                f"authorization: Bearer plain-key\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            for _ in range(number % 7):
                connection.recv(512)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(read_some, range(200)))
    eventually(lambda: idle(fleet), within_s=60)
    assert complete(fleet).status == 200


def test_without_the_local_socket_tokens_come_through_serve(fleet: FabricServer) -> None:
    """The way they take between machines."""
    folder = next(
        run_folder(process["pid"])
        for process in fleet.get("/fabric/status").json()["processes"]
        if process["name"] == "guardian.py"
    )
    before = complete(fleet, seed=5, temperature=1.0, max_tokens=40).json()
    sockets = list((folder / "s").iterdir())
    assert len(sockets) == 2
    for socket_file in sockets:
        socket_file.rename(socket_file.with_suffix(".hidden"))
    # Streams that are open still use it; they close after a second without requests.
    eventually(lambda: idle(fleet))
    time.sleep(2.5)
    again = [complete(fleet, seed=5, temperature=1.0, max_tokens=40) for _ in range(4)]
    for socket_file in sockets:
        socket_file.with_suffix(".hidden").rename(socket_file)
    assert {one.json()["choices"][0]["text"] for one in again} == {before["choices"][0]["text"]}


def run_folder(guardian: int) -> Path:
    """The private folder of a run."""
    return Path(Path(f"/proc/{guardian}/cmdline").read_bytes().split(b"\0")[-2].decode())


def idle(fleet: FabricServer) -> bool:
    metrics = fleet.metrics()
    busy = (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "fabric_requests_swapped",
        "fabric_open_requests",
        "fabric_queue_requests",
        "fabric_queue_tokens",
        "fabric_fleet_requests_waiting",
    )
    return not any(value for series, value in metrics.items() if series.split("{")[0] in busy)


def listening_sockets(pids: list[int]) -> Iterator[tuple[str, int]]:
    """(address, port) of every listening TCP socket of these processes."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = str(link.readlink()) if link.is_symlink() else ""
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{pids[0]}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                yield socket.inet_ntop(family, b"".join(words)), int(port, 16)
