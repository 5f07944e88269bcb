"""`fabric bench` as it is typed, against a real server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from kit.sse_server import Behaviour, running

from fabric.bench.command import Surroundings, run
from fabric.bench.server import free_port


def bench(*words: str, **options: object) -> int:
    return run(words, Surroundings(model_folder=Path, **options))  # type: ignore[arg-type]


def test_bench_serve_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    with running() as server:
        words = ["serve", "--url", server.url, "--workload", "chat", "prefix"]
        words += ["--concurrency", "1", "2", "--requests", "2", "--json", str(path)]
        assert bench(*words, "--ttft-ms", "60000", "--tpot-ms", "60000") == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    rows = [line for line in lines if line[:2] in (["chat", "c=1"], ["prefix", "c=2"])]
    assert [row[2] for row in rows] == ["2/2", "2/2"]
    assert "goodput/s" in shown
    record = json.loads(path.read_text())
    assert record["prompts"] == "tokens"
    assert record["targets"] == {"ttft_ms": 60000, "tpot_ms": 60000, "e2e_ms": None}
    assert [cell["concurrency"] for cell in record["cells"]] == [1, 2, 1, 2]
    assert all(cell["good_share"] == 1 for cell in record["cells"])
    assert record["cells"][0]["output_tokens"] == 2 * 128


def test_open_loop_and_words_for_a_server_without_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with running(Behaviour(takes_token_ids=False)) as server:
        words = ["serve", "--url", server.url, "--workload", "decode", "--rate", "100"]
        assert bench(*words, "--requests", "5", "--json", str(path)) == 0
        assert all(isinstance(body["prompt"], str) for body in server.requests[1:])
    record = json.loads(path.read_text())
    assert record["prompts"] == "text"
    assert record["cells"][0]["arrivals"] == {"rate_per_s": 100, "variation": 1}


def test_natural_ends_are_asked_for(tmp_path: Path) -> None:
    with running() as server:
        words = ["serve", "--url", server.url, "--workload", "chat", "--concurrency", "1"]
        words += ["--requests", "1", "--natural-end", "--prompts", "chat"]
        assert bench(*words, "--json", str(tmp_path / "r.json")) == 0
        assert all("ignore_eos" not in body for body in server.requests)


def test_errors_make_the_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(Behaviour(cut_after=2)) as server:
        words = ["serve", "--url", server.url, "--workload", "chat", "--concurrency", "1"]
        words += ["--requests", "2", "--json", str(tmp_path / "r.json")]
        assert bench(*words) == 1
    assert "2 × the connection closed" in capsys.readouterr().out


def test_no_server_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("serve", "--url", f"http://127.0.0.1:{free_port()}") == 1
    assert "is the server up?" in capsys.readouterr().err


def test_a_peer_that_is_not_at_hand_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["peers", "--only-peers", "--peer", "llama.cpp", "--llama-server", "no-such-server"]
    assert bench(*words) == 1
    assert "build llama.cpp" in capsys.readouterr().err


def test_other_benchmarks_get_the_words_that_follow() -> None:
    seen: list[Sequence[str]] = []

    def engine(words: Sequence[str]) -> int:
        seen.append(words)
        return 7

    assert bench("engine", "--batch", "8", others={"engine": engine}) == 7
    assert seen == [("--batch", "8")]
