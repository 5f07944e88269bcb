"""Prompts in one pool, outputs in another, by real HTTP: the text is that of one engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kit.fabric_server import FabricServer, eventually, serving

from fabric.driver import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
TOKENS = 24
STORIES = (
    "The old lighthouse keeper counted ships by night and stones by day. ",
    "A parser reads tokens one at a time and builds a tree from them. ",
    "Every spring the river rises over the lower fields and then it falls. ",
    "Three engineers met a locomotive that would not start in the cold. ",
)
PROMPTS = tuple(f"{number}. {story * 30}And then" for number, story in enumerate(STORIES))


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """What one worker in this process says."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    llm = LLM(device_bytes=128 << 20, host_bytes=0)
    return [one.text for one in llm.generate(PROMPTS, params, progress=False)]


def config(folder: Path, pools: str) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(
        "kv: {device_bytes: 134217728, host_bytes: 16777216}\n"
        "model: {name: demo, threads: 1}\n"
        f"pools: {pools}\n"
    )
    return ["--config", str(path)]


def ask(server: FabricServer, prompt: str) -> str:
    body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    answer = server.post("/v1/completions", body | {"ignore_eos": True})
    assert answer.status == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def ask_all(server: FabricServer) -> list[str]:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: ask(server, prompt), PROMPTS))


def replica(server: FabricServer, pool: str) -> dict[str, Any]:
    rows = server.get("/fabric/status").json()["replicas"]
    (found,) = [row for row in rows if row["pool"] == pool]
    row: dict[str, Any] = found
    return row


@pytest.mark.timeout(300)
def test_the_deployment_file(alone: list[str], tmp_path: Path) -> None:
    """Token-identical; KV has really gone over; both pools are empty afterwards."""
    path = ROOT / "deployments" / "disaggregated.yaml"
    with serving(tmp_path, "--config", str(path), "--name", "demo") as server:
        assert ask_all(server) == alone
        counts = replica(server, "decode")["handover"]
        # Where the prefill pool is full and nobody decodes, a prompt is computed where it goes on.
        handed = server.gauge("fabric_handover_sampled_total")
        assert 1 <= handed <= len(PROMPTS)
        assert not [name for name in counts if name.startswith("fallback")], counts
        assert counts["bytes_received"] >= handed * 256 * 23_040
        assert replica(server, "prefill")["handover"]["groups_sent"] == counts["groups_received"]
        for pool in ("prefill", "decode"):
            eventually(lambda pool=pool: replica(server, pool)["kv_usage"] == 0)
        assert ask(server, "A short one:")  # computed where it goes on
        assert server.gauge("fabric_handover_sampled_total") == handed


@pytest.mark.nightly
@pytest.mark.timeout(400)
@pytest.mark.parametrize("tps", [(1, 2), (2, 1)])
def test_pools_of_other_shards(alone: list[str], tmp_path: Path, tps: tuple[int, int]) -> None:
    """Blocks are sliced anew on arrival."""
    prefill, decode = (f"{{shard: {{tp: {tp}}}}}" for tp in tps)
    pools = f"{{prefill: {prefill}, decode: {decode}}}"
    with serving(tmp_path, *config(tmp_path, pools)) as server:
        assert ask_all(server) == alone
        counts = replica(server, "decode")["handover"]
        assert counts["runs_landed"] >= 1
        assert not [name for name in counts if name.startswith("fallback")], counts
