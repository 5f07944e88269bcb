"""The demo model as a user gets it: `fabric serve`, curl, the official client, `fabric status`.

One server for all tests; the last one ends it.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from kit.fabric_server import FabricServer, eventually
from kit.source import ROOT
from openai import OpenAI

MODEL = "SmolLM2-135M-Instruct"
QUESTION = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FabricServer]:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "config.yaml").write_text("kv: {device_bytes: 268435456, host_bytes: 67108864}")
    running = FabricServer(["--config", str(folder / "config.yaml")], folder)
    try:
        yield running.wait_until_ready()
    finally:
        running.stop()
    assert not running.left_over()


@pytest.fixture(scope="module")
def client(server: FabricServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)


def test_the_printed_curl_line_answers_with_sense(server: FabricServer) -> None:
    """The line is pasted into a shell as it stands."""
    lines = server.output.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.strip().startswith("curl "))
    command = "\n".join(lines[begin : begin + 2])
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)["choices"][0]["message"]["content"]
    assert "Paris" in answer


def test_progress_and_logs_were_shown(server: FabricServer) -> None:
    for part in ("weights:", "KV pool:", "first token after", "Logs:"):
        assert part in server.output
    # Nobody's text is in the log.
    folder = server.output.split("Logs: ")[1].splitlines()[0]
    logs = subprocess.run(["grep", "-rc", "capital of", folder], capture_output=True, text=True)
    assert all(line.endswith(":0") for line in logs.stdout.splitlines())
    requests = subprocess.run(
        ["sh", "-c", f"cat {folder}/requests-*"], capture_output=True, text=True
    ).stdout.splitlines()
    assert all(json.loads(line)["request_id"] for line in requests)
    assert requests


def test_chat_whole_and_streamed_agree(client: OpenAI) -> None:
    arguments = {"model": MODEL, "messages": [QUESTION], "temperature": 0, "max_tokens": 32}
    whole = client.chat.completions.create(**arguments)
    parts = list(
        client.chat.completions.create(
            **arguments, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert "Paris" in text
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].finish_reason == "stop"


def test_a_prefix_is_found_again(client: OpenAI) -> None:
    prompt = " ".join(f"The number after {i} is {i + 1}." for i in range(40))
    create = client.completions.create
    first, second = (create(model=MODEL, prompt=prompt, max_tokens=4) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= second.usage.prompt_tokens - 32


def test_greedy_answers_do_not_depend_on_the_company(client: OpenAI) -> None:
    prompts = [f"Write one sentence about the number {i}." for i in range(12)]

    def answer(prompt: str) -> str:
        done = client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0)
        return done.choices[0].text

    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(answer, prompts))
    assert together == alone


def test_unicode_split_over_tokens_arrives_whole(server: FabricServer, client: OpenAI) -> None:
    """Emoji and Chinese take several tokens a character; no event may hold half of one."""
    text = "日本語 🎉🚀 ελληνικά — 你好"
    bias = {}
    tokens = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    for token in tokens:
        bias[str(token)] = 100
    parts = client.completions.create(
        model=MODEL,
        prompt=text,
        max_tokens=64,
        seed=3,
        temperature=1,
        logit_bias=bias,
        stream=True,
    )
    pieces = [part.choices[0].text for part in parts if part.choices]
    whole = client.completions.create(
        model=MODEL, prompt=text, max_tokens=64, seed=3, temperature=1, logit_bias=bias
    )
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) > 4
    assert any(ord(letter) > 0x2000 for letter in whole.choices[0].text)


def test_slow_readers_hold_up_nobody(server: FabricServer, client: OpenAI) -> None:
    body = json.dumps(
        {"model": MODEL, "prompt": "Tell", "max_tokens": 300, "stream": True, "ignore_eos": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    readers = []
    for _ in range(16):
        reader = socket.create_connection(("127.0.0.1", server.port))
        reader.sendall(head.encode() + body)  # and never reads
        readers.append(reader)
    answer = client.chat.completions.create(model=MODEL, messages=[QUESTION], max_tokens=16)
    assert answer.choices[0].message.content
    for reader in readers:
        reader.close()
    eventually(lambda: server.gauge("vllm:num_requests_running") == 0, within_s=60)
    assert server.gauge("vllm:kv_cache_usage_perc") == 0


def test_status_is_a_table(server: FabricServer) -> None:
    command = [sys.executable, "-m", "fabric.cli", "status", "--url", server.url]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert MODEL in run.stdout
    assert "ready" in run.stdout
    assert "gen tok/s" in run.stdout


def test_the_server_fits_in_memory(server: FabricServer) -> None:
    record = server.get("/fabric/status").json()
    pss = sum(one["pss_bytes"] - one["shared_bytes"] for one in record["processes"])
    pools = sum(one["kv_pool_bytes"] for one in record["replicas"])
    assert pss - pools < 2.5e9


def test_a_second_server_on_the_same_port_is_refused_at_once(server: FabricServer) -> None:
    command = [sys.executable, "-m", "fabric.cli", "serve", "--port", str(server.port)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert f"can't listen on 127.0.0.1:{server.port}" in run.stderr
    assert run.stderr.count("\n") == 1


def test_sigterm_lets_running_requests_finish(server: FabricServer, client: OpenAI) -> None:
    got: list[str] = []
    finish: list[str | None] = []
    begun = threading.Event()

    def read() -> None:
        stream = client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=200,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for part in stream:
            begun.set()
            got.append(part.choices[0].text)
            finish.append(part.choices[0].finish_reason)

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    server.signal(signal.SIGTERM)
    late: list[int] = []

    def refused() -> bool:
        try:
            answer = server.post(
                "/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 1}
            )
        except OSError:
            return True  # already gone
        late.append(answer.status)
        return answer.status == 503 and answer.json()["error"]["message"] != ""

    eventually(refused)
    reader.join(60)
    assert finish[-1] == "length"
    assert server.wait() == 0
    assert not server.left_over(), server.output
