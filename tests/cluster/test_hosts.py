"""Clusters of several hosts (network namespaces): real Ray nodes, HTTP at the head, no shortcuts.

Text is compared with what the engine in this process says: greedily and on the CPU it is the same
wherever the model's parts are.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from kit.fabric_server import eventually
from kit.hosts import Host, hosts, need, tool
from kit.ray_cluster import HTTP_PORT, RayCluster, ray_cluster

from fabric.cluster.processes import PROC
from fabric.driver import LLM, SamplingParams

TOKENS = 24
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time,")
SMALL = {"kv": {"device_bytes": 64 << 20, "host_bytes": 0}, "model": {"name": "demo", "threads": 1}}
REDIS_PORT = 6380


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short-named: Ray puts Unix sockets there."""
    path = Path(tempfile.mkdtemp(prefix="fc", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """What one worker in this process says."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    llm = LLM(device_bytes=64 << 20, host_bytes=0)
    return [one.text for one in llm.generate(PROMPTS, params, progress=False)]


def write(folder: Path, **settings: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(SMALL | settings))
    return path


def complete(cluster: RayCluster, prompt: str = PROMPTS[0], tokens: int = TOKENS) -> str | None:
    """The text; None where the request failed."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = cluster.ask("/v1/completions", body | {"ignore_eos": True})
    if answer.status != 200:
        return None
    text: str = answer.json()["choices"][0]["text"]
    return text


def ask_all(cluster: RayCluster) -> list[str | None]:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: complete(cluster, prompt), PROMPTS))


def replicas(cluster: RayCluster) -> int:
    answer = cluster.ask("/fabric/status")
    return len(answer.json()["replicas"]) if answer.status == 200 else 0


class Stream:
    """Requests one after the other, on a thread, for as long as it is open."""

    def __init__(self, cluster: RayCluster, wanted: str) -> None:
        self.done, self.failed, self.wrong = 0, [], 0  # type: int, list[str], int
        self._cluster, self._wanted = cluster, wanted
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(2)]

    def __enter__(self) -> Stream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        body = {"model": "demo", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}
        while not self._end.is_set():
            answer = self._cluster.ask("/v1/completions", body | {"ignore_eos": True})
            if answer.status != 200:
                self.failed.append(f"{answer.status}: {answer.text[:200]}")
            elif answer.json()["choices"][0]["text"] != self._wanted:
                self.wrong += 1
            else:
                self.done += 1


def test_hosts_have_addresses_of_their_own_and_a_link_to_cut() -> None:
    with hosts(2) as (one, two):
        ping = ("ping", "-c", "1", "-W", "2", two.address) if shutil.which("ping") else None
        assert _reaches(one, two), ping
        two.cut()
        assert not _reaches(one, two)
        two.heal()
        eventually(lambda: _reaches(one, two))
        sleeper = one.start("sleep", "1000", log=Path("/dev/null"))
        eventually(lambda: sleeper.pid in one.pids())
    assert sleeper.wait(10) == -signal.SIGTERM


def _reaches(one: Host, two: Host) -> bool:
    """A TCP connection that is refused has been there and back."""
    import socket

    def knock() -> bool:
        try:
            socket.create_connection((two.address, 9), timeout=2).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True

    return one.inside(knock)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_model_over_two_nodes(folder: Path, alone: list[str]) -> None:
    """tp=2, a worker a node, over gloo; plans by TCP. The same configuration again changes nothing;
    `serve deploy`'s form is what runs."""
    config = write(folder, shard={"tp": 2, "bundle": "worker"})
    with ray_cluster(3, folder) as cluster:
        assert "fabric: new" in cluster.deploy(config)
        assert ask_all(cluster) == alone
        record = cluster.status()
        workers = record["replicas"][0]["shards"]
        assert {one["node"] for one in workers} == {one.address for one in cluster.hosts[1:]}
        assert [one["alive"] for one in record["nodes"]] == [True] * 3
        assert "nothing to change" in cluster.deploy(config)
        told = cluster.fabric("status", "--address", cluster.address).stdout
        assert all(one.address in told for one in cluster.hosts)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_node_cut_off_and_back(folder: Path, alone: list[str]) -> None:
    """The rest serves on. What was on the lost node ends there when it hears that it was given up,
    and a node that is started on it again gets a replica as before."""
    with ray_cluster(3, folder) as cluster:
        cluster.deploy(write(folder, replicas=2))
        assert replicas(cluster) == 2
        lost = cluster.hosts[2]
        lost.cut()
        time.sleep(1.0)
        lost.heal()
        assert ask_all(cluster) == alone, "a moment without the link costs nothing"
        assert replicas(cluster) == 2
        lost.cut()
        cluster.wait_for(2)
        eventually(lambda: replicas(cluster) == 1, within_s=60)
        assert ask_all(cluster) == alone
        lost.heal()
        eventually(lambda: not lost.pids(), within_s=120)
        cluster.start_node(lost)
        cluster.wait_for(3)
        eventually(lambda: replicas(cluster) == 2, within_s=180)
        assert ask_all(cluster) == alone


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_an_update_without_a_failed_request(folder: Path, alone: list[str]) -> None:
    """Front and engine are replaced, then the number of engines changes, under a stream of
    requests; none fails, and every answer is right."""
    with ray_cluster(3, folder) as cluster:
        cluster.deploy(write(folder))
        with Stream(cluster, alone[0]) as stream:
            eventually(lambda: stream.done > 2)
            before = cluster.status()["replicas"][0]["replica"]
            told = cluster.deploy(write(folder, engine={"max_sequences": 32}))
            assert "engine.max_sequences: 64 -> 32" in told
            eventually(lambda: replicas(cluster) == 1, within_s=60)
            after = cluster.status()["replicas"][0]["replica"]
            assert after != before
            done = stream.done
            told = cluster.deploy(write(folder, engine={"max_sequences": 32}, replicas=2))
            assert "replicas: 1 -> 2" in told
            eventually(lambda: replicas(cluster) == 2, within_s=60)
            names = {one["replica"] for one in cluster.status()["replicas"]}
            assert after in names, "more replicas, none restarted"
            eventually(lambda: stream.done > done + 2)
        assert stream.failed == []
        assert stream.wrong == 0


LONG = "One more sheep jumps over the fence, and then " * 20


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_pools_on_different_nodes(folder: Path, alone: list[str]) -> None:
    """A long prompt is computed on one node and goes on at another, its KV over the link between
    them; then a pool gets a second replica on a third node under a stream of requests."""
    prefill = {"replicas": 1, "chunk_tokens": 64}
    pools = {"prefill": prefill, "decode": {"replicas": 1}, "min_prompt_tokens": 64}
    with ray_cluster(4, folder) as cluster:
        cluster.deploy(write(folder, pools=pools))
        eventually(lambda: replicas(cluster) == 2, within_s=60)
        assert ask_all(cluster) == alone, "short ones take no detour"
        began = time.monotonic()
        long = complete(cluster, LONG)
        long_s = time.monotonic() - began
        assert long is not None
        record = cluster.status()
        rows = {one["pool"]: one["handover"] for one in record["replicas"]}
        assert rows["decode"]["runs_landed"] >= 1
        assert rows["decode"]["bytes_received"] >= 200 * 23_040
        busy = [one for one in record["nodes"] if one["total"]["CPU"] and not one["free"]["CPU"]]
        assert len(busy) == 2, "a pool a node"
        names = {one["replica"] for one in record["replicas"]}
        storm_of_aborts(cluster, long_s)
        with Stream(cluster, alone[0]) as stream:
            eventually(lambda: stream.done > 1)
            larger = pools | {"decode": {"replicas": 2}}
            assert "pools.decode.replicas: 1 -> 2" in cluster.deploy(write(folder, pools=larger))
            eventually(lambda: replicas(cluster) == 3, within_s=120)
            done = stream.done
            eventually(lambda: stream.done > done + 2)
            cluster.deploy(write(folder, pools=pools))
            eventually(lambda: replicas(cluster) == 2, within_s=120)
            done = stream.done
            eventually(lambda: stream.done > done + 2)
        assert stream.failed == []
        assert stream.wrong == 0
        kept = {one["replica"] for one in cluster.status()["replicas"]}
        assert len(names & kept) >= 1, "the prefill pool was not touched"
        assert complete(cluster, LONG) == long, "held by the decode pool now, or computed again"


def storm_of_aborts(cluster: RayCluster, long_s: float) -> None:
    """Clients leave at every moment of a hand-over: nothing of theirs stays in the object store,
    which holds what it held before, nor in a pool. `long_s`: what one takes that is alone."""
    before = store_bytes(cluster)

    def leave(number: int) -> None:
        body = json.dumps({"model": "demo", "prompt": f"{number} {LONG}", "max_tokens": 200})
        line = http.client.HTTPConnection("127.0.0.1", HTTP_PORT, timeout=60)
        line.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        time.sleep(long_s * number / 4)
        line.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: cluster.head.inside(lambda: leave(n)), range(24)))
    eventually(lambda: store_bytes(cluster) == before, within_s=120)
    rows = cluster.ask("/fabric/status").json()["replicas"]
    assert [one["kv_usage"] for one in rows] == [0.0, 0.0]
    moved = sum(one["handover"].get("groups_sent", 0) for one in rows)
    assert moved > 10, "too few got as far as that"


def store_bytes(cluster: RayCluster) -> int:
    """In use in the object stores of all nodes."""
    script = (
        "import ray\n"
        "from ray._private.internal_api import get_memory_info_reply, get_state_from_address\n"
        f"ray.init(address='{cluster.address}', log_to_driver=False, logging_level='ERROR')\n"
        f"reply = get_memory_info_reply(get_state_from_address('{cluster.address}'))\n"
        "print('STORE', reply.store_stats.object_store_bytes_used)\n"
    )
    done = cluster.head.run(tool("python"), "-c", script, environment=cluster.environment)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("STORE"))
    return int(line.split()[1])


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_what_serve_deploy_takes(folder: Path, alone: list[str]) -> None:
    """Over Serve's REST API, which is on the head's loopback and nowhere else."""
    config = write(folder)
    with ray_cluster(2, folder, dashboard=True) as cluster:
        form = folder / "serve.yaml"
        form.write_text(cluster.fabric("deploy", str(config), "--serve-config").stdout)
        environment = cluster.environment
        api = ("--address", "http://127.0.0.1:8265")
        cluster.head.run(tool("serve"), "deploy", str(form), *api, environment=environment)
        eventually(lambda: complete(cluster) == alone[0], within_s=180)
        assert "nothing to change" in cluster.deploy(config)
        assert _listening_beyond_loopback(cluster) & {8000, 8265} == set()


def _listening_beyond_loopback(cluster: RayCluster) -> set[int]:
    """TCP ports of the head on any other address."""
    lines = cluster.head.run("ss", "-Hltn").stdout.splitlines()
    local = [line.split()[3] for line in lines]
    return {int(one.rpartition(":")[2]) for one in local if not one.startswith(("127.", "[::1]"))}


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_control_store_restarts(folder: Path, alone: list[str]) -> None:
    """GCS with its tables in Redis: while it is away requests are served, and afterwards the
    cluster is as before and can be changed."""
    redis = need("redis-server", "redis-server")
    with hosts(2) as members:
        head = members[0]
        store = ("--port", str(REDIS_PORT), "--save", "", "--bind", head.address)
        head.start(redis, *store, "--protected-mode", "no", log=folder / "redis.log")
        address = f"{head.address}:{REDIS_PORT}"
        cluster = RayCluster(members, folder, cpus=2, RAY_REDIS_ADDRESS=address)
        cluster.start_node(head, block=False)
        cluster.wait_for(1)
        cluster.start_node(members[1])
        cluster.wait_for(2)
        cluster.deploy(write(folder))
        with Stream(cluster, alone[0]) as stream:
            eventually(lambda: stream.done > 1)
            again = _restart_gcs(cluster, lambda: stream.done)
            cluster.wait_for(2)
            done = stream.done
            eventually(lambda: stream.done > done + 2)
            told = cluster.deploy(write(folder, replicas=2))
            assert "replicas: 1 -> 2" in told
            eventually(lambda: replicas(cluster) == 2, within_s=60)
        assert again.poll() is None
        assert stream.failed == []
        assert stream.wrong == 0


def _restart_gcs(cluster: RayCluster, done: Any) -> subprocess.Popen[bytes]:
    """Kill it, see that requests go on without it, start it as it was started."""
    found = [(pid, (PROC / f"{pid}/cmdline").read_bytes()) for pid in cluster.head.pids()]
    pid, command = next(pair for pair in found if b"gcs_server" in pair[1].split(b"\0")[0])
    words = command.decode().split("\0")[:-1]
    pairs = (PROC / f"{pid}/environ").read_bytes().decode().split("\0")[:-1]
    os.kill(pid, signal.SIGKILL)
    before = done()
    eventually(lambda: done() > before + 2)
    time.sleep(1)
    environment = dict(pair.split("=", 1) for pair in pairs)
    return cluster.head.start(*words, log=cluster.folder / "gcs.log", environment=environment)
