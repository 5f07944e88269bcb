"""The demo model over several workers, as Ray actors behind HTTP: the text is the single worker's.

On the CPU tp 1, 2 and 3 add in the same chunks and the same order, so that is no tolerance.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kit.fabric_server import FabricServer, eventually, serving
from kit.tiny_models import make_tiny_model

from fabric.cluster.processes import PROC
from fabric.driver import LLM, SamplingParams

POOLS = "kv: {device_bytes: 67108864, host_bytes: 16777216}\n"
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The three primary colours are",
    "In 1969, the first humans",
)
TOKENS = 24


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """What the worker in this process says to each prompt."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    llm = LLM(device_bytes=64 << 20, host_bytes=0)
    return [one.text for one in llm.generate(PROMPTS, params, progress=False)]


def arguments(folder: Path, shard: str) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(f"{POOLS}shard: {shard}\nmodel: {{name: demo, threads: 1}}\n")
    return ["--config", str(path)]


def ask(server: FabricServer, prompt: str, **fields: object) -> str:
    body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    answer = server.post("/v1/completions", body | {"ignore_eos": True} | fields)
    assert answer.status == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def ask_all(server: FabricServer) -> list[str]:
    """At once, so that they share steps, and a pipeline has several under way."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: ask(server, prompt), PROMPTS))


def shards(server: FabricServer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.get("/fabric/status").json()["replicas"][0]["shards"]
    return found


@pytest.mark.timeout(300)
def test_two_tensor_parallel_workers(alone: list[str], tmp_path: Path) -> None:
    """They say the same; at rest they sleep."""
    with serving(tmp_path, *arguments(tmp_path, "{tp: 2}")) as server:
        assert ask_all(server) == alone
        workers = shards(server)
        assert [one["tp_rank"] for one in workers] == [0, 1]
        weights = [one["weight_bytes"] for one in workers]
        assert max(weights) < 0.75 * sum(weights), "each holds its slice only"
        assert server.gauge("fabric_shard_weight_bytes") == sum(weights)
        at_rest_s = _cpu_s(workers)
        time.sleep(3.0)
        for before_s, after_s in zip(at_rest_s, _cpu_s(workers), strict=True):
            assert after_s - before_s <= 0.02 * 3.0, "it spins"


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_killed_worker_of_the_demo_model(alone: list[str], tmp_path: Path) -> None:
    """Its group is made anew and what was under way goes on (tests/cluster/faults kills smaller
    ones more often)."""
    with serving(tmp_path, *arguments(tmp_path, "{tp: 2}")) as server:
        workers = shards(server)
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(ask_all, server)
            eventually(lambda: server.gauge("vllm:num_requests_running") > 0)
            os.kill(workers[1]["pid"], signal.SIGKILL)
            assert under_way.result() == alone
        eventually(lambda: server.get("/ready").status == 200, within_s=180)
        assert {one["pid"] for one in shards(server)}.isdisjoint(one["pid"] for one in workers)
        assert not any((PROC / str(one["pid"])).exists() for one in workers)
        assert ask_all(server) == alone
        server.processes()


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_two_pipeline_stages(alone: list[str], tmp_path: Path) -> None:
    with serving(tmp_path, *arguments(tmp_path, "{pp: 2}")) as server:
        assert ask_all(server) == alone
        assert [one["pp_rank"] for one in shards(server)] == [0, 1]


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "shard", ["{tp: 2, pp: 2}", "{tp: 3}", "{pp: 3}", "{tp: 2, bundle: worker}"]
)
def test_other_products(alone: list[str], tmp_path: Path, shard: str) -> None:
    with serving(tmp_path, *arguments(tmp_path, shard)) as server:
        assert ask_all(server) == alone


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_experts_on_two_workers_and_their_loads(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "MixtralForCausalLM")
    with serving(tmp_path, str(model), *arguments(tmp_path, "{ep: 2}")) as server:
        ask(server, "hello", max_tokens=8)
        eventually(lambda: server.gauge("fabric_expert_rows_total") > 0)
        by_worker = [one["expert_loads"] for one in shards(server)]
        assert all(sum(loads) > 0 for loads in by_worker)


def test_more_workers_than_the_model_can_use_are_refused(tmp_path: Path) -> None:
    """Before anything starts, with the number that is too large."""
    server = FabricServer(arguments(tmp_path, "{pp: 31}"), tmp_path)
    assert server.wait() == 2
    assert "30 layers" in server.output
    assert "Traceback" not in server.output


def _cpu_s(workers: list[dict[str, Any]]) -> list[float]:
    """CPU seconds of each worker so far."""
    ticks = os.sysconf("SC_CLK_TCK")
    stats = [(PROC / str(one["pid"]) / "stat").read_text() for one in workers]
    fields = [stat.rsplit(")", 1)[1].split() for stat in stats]
    return [(int(each[11]) + int(each[12])) / ticks for each in fields]
