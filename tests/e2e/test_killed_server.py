"""A server that is killed in the middle of its work, as the memory killer does it: nobody can tidy
up. All its processes end all the same, and its journal decides again all that it decided.

Before that, clients that come too early.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kit.fabric_server import START_TIMEOUT_S, FabricServer, eventually
from openai import OpenAI, OpenAIError

from fabric.cli import main
from fabric.core.engine.engine import Engine
from fabric.journal.reader import journals, play, replay_of

MODEL = "SmolLM2-135M-Instruct"
ANSWERS = 8


pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class Killed:
    """What was seen of the server. `early`: the status codes that the first clients got."""

    journals: Path
    early: set[int]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """With room for two of the eight answers that were asked for at once."""
    home = tmp_path_factory.mktemp("journal")
    config = {
        "model": {"context_limit": 256},
        "kv": {"device_bytes": 11 << 20, "host_bytes": 4 << 20},
        "journal": {"path": str(home / "journals"), "file_bytes": 1 << 16},
        "autoscaling": {"min_replicas": 1, "max_replicas": 1},
    }
    (home / "config.yaml").write_text(yaml.safe_dump(config))
    server = FabricServer(["--config", str(home / "config.yaml")], home)
    try:
        early = statuses_until_ready(server)
        server.wait_until_ready()
        first = OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
        first.completions.create(model=MODEL, prompt="One, two,", max_tokens=8)
        seen: list[int] = []
        for number in range(ANSWERS):
            threading.Thread(target=ask, args=(server.url, number, seen), daemon=True).start()
        eventually(lambda: server.gauge("vllm:num_preemptions_total") > 0, within_s=60)
        enough = len(seen) + 200  # what is still on its way to the file dies with the server
        eventually(lambda: len(seen) > enough, within_s=60)
        server.signal(signal.SIGKILL)
        server.wait()
        eventually(lambda: not server.left_over(), within_s=60)
    finally:
        server.stop()
    return Killed(home / "journals", early)


def statuses_until_ready(server: FabricServer) -> set[int]:
    """What a client that comes too early gets: a JSON error with a time to wait."""
    found: set[int] = set()
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Serving " not in server.output and time.monotonic() < deadline:
        with suppress(OSError):  # nobody listens yet
            answer = server.get("/v1/models")
            found.add(answer.status)
            if answer.status == 503:
                assert answer.json()["error"]["type"]
                assert int(answer.headers["retry-after"]) >= 1
        time.sleep(0.05)
    return found


def ask(url: str, number: int, seen: list[int]) -> None:
    """A long answer; some of the clients leave early, some come again."""
    client: Any = OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    tier = ("priority", "default", "flex")[number % 3]
    with suppress(OpenAIError):  # the server is killed
        for turn in range(100):
            stream = client.completions.create(
                model=MODEL,
                prompt=f"{number} {turn}: Once upon a time",
                max_tokens=150,
                stream=True,
                extra_body={"ignore_eos": True, "service_tier": tier},
            )
            for count, _ in enumerate(stream):
                seen.append(number)
                if number % 4 == 3 and count == 20:
                    break
            stream.close()


def test_who_comes_too_early_is_told_to_wait(killed: Killed) -> None:
    assert killed.early <= {200, 503}


def test_everything_is_decided_again(killed: Killed, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(killed.journals)]) == 0
    said = capsys.readouterr().out
    for stream in ("engine", "dispatcher", "autoscaler"):
        assert f"{stream} " in said
    assert said.count("every outcome is the same") == 3


def test_it_was_worth_recording(killed: Killed) -> None:
    """Preemptions are in it."""
    (journal,) = [one for one in journals([killed.journals]) if one.header.stream == "engine"]
    replay = replay_of(journal)
    for _ in play(journal, replay):
        pass
    engine = replay.machines["engine"]
    assert isinstance(engine, Engine)
    snapshot = engine.snapshot("", 0)
    assert snapshot.preemptions_total > 0
    assert snapshot.generated_tokens_total > 100
