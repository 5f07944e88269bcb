"""Replicas that fetch prefixes from each other, over HTTP: the text is that of one engine, also
where what was lent came back from disk hurt, or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.fabric_server import FabricServer, eventually, serving

from fabric.driver import LLM, SamplingParams

TOKENS = 12
STORY = "The old lighthouse keeper counted ships by night and stones by day. "
PROMPTS = tuple(f"{number}. {STORY * 40}And then" for number in range(8))
HURT, GONE = PROMPTS[:4], PROMPTS[4:]
# What is lent of these prompts is more than Ray's store has memory for.
CONFIG = """\
model: {name: demo, threads: 1}
kv:
  device_bytes: 201326592
  host_bytes: 0
  prefix_fetch: {bytes_per_s: 100000000, store_bytes: 268435456}
replicas: 3
router: {policy: round_robin}
ray: {object_store_bytes: 83886080}
"""


class Turns:
    """Three replicas that get prompts in the order of their names."""

    def __init__(self, server: FabricServer) -> None:
        self.server = server
        rows = server.get("/fabric/status").json()["replicas"]
        self.names = sorted(row["replica"] for row in rows)
        self.last = ""
        self.fillers = 0

    def ask(self, prompt: str, at: int, tokens: int = TOKENS) -> str:
        """The text, from replica `at`."""
        while self.last != self.names[at - 1]:
            self.fillers += 1
            self._send(f"{self.fillers}?", 1)
        text = self._send(prompt, tokens)
        assert self.last == self.names[at], "not in turns"
        return text

    def _send(self, prompt: str, tokens: int) -> str:
        body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        answer = self.server.post("/v1/completions", body | {"ignore_eos": True})
        assert answer.status == 200, answer.text
        self.last = answer.headers["x-fabric-replica"]
        text: str = answer.json()["choices"][0]["text"]
        return text


def counts(server: FabricServer) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in server.get("/fabric/status").json()["replicas"]:
        for name, value in row["handover"].items():
            found[name] = found.get(name, 0) + value
    return found


def failures(server: FabricServer) -> dict[str, float]:
    found = counts(server)
    return {name: found[name] for name in found if name.startswith("loan_failed")}


def spilled(server: FabricServer) -> Iterator[Path]:
    """Files in which Ray keeps what its store has no memory for."""
    folders = set()
    for one in server.processes():
        words = Path(f"/proc/{one.pid}/cmdline").read_bytes().decode()
        folders.update(re.findall(r"--session_dir=([^\0]+)", words))
    for folder in sorted(folders):
        yield from (one for one in Path(folder).glob("ray_spilled_objects*/*") if one.is_file())


def hurt(path: Path) -> None:
    """A bit in every half MiB."""
    with path.open("r+b") as file:
        size = path.stat().st_size
        for at in range(300_000, size, 1 << 19):
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 4]))


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_prefixes_go_from_one_to_the_other(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    llm = LLM(device_bytes=128 << 20, host_bytes=0)
    alone = {
        prompt: one.text
        for prompt, one in zip(PROMPTS, llm.generate(PROMPTS, params, progress=False), strict=True)
    }
    del llm
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    with serving(tmp_path, "--config", str(path)) as server:
        turns = Turns(server)
        assert not counts(server).get("loans"), "before there was a prefix"
        for prompt in PROMPTS:
            assert turns.ask(prompt, at=0) == alone[prompt]
            assert turns.ask(prompt, at=1) == alone[prompt], "with the other replica's KV"
        found = counts(server)
        assert found["loans"] == len(PROMPTS)
        assert not failures(server)
        assert found["loan_tokens"] == found["lent_tokens"] > len(PROMPTS) * 256

        assert list(spilled(server)), "nothing is on disk"
        for file in spilled(server):
            hurt(file)
        for prompt in HURT:
            assert turns.ask(prompt, at=2) == alone[prompt], "with KV that was hurt"
        assert failures(server)["loan_failed_checksum"] > 0
        assert counts(server)["lent_tokens_kept"] > 0

        before = sum(failures(server).values())
        for file in spilled(server):
            file.unlink()
        for prompt in GONE:
            assert turns.ask(prompt, at=2) == alone[prompt], "without KV that is gone"
        assert sum(failures(server).values()) > before
        eventually(lambda: server.gauge("vllm:kv_cache_usage_perc") == 0)
