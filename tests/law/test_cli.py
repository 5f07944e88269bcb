"""Rule 6: config is data. The flags are frozen here: a new setting goes into FabricConfig."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.source import ROOT

from fabric import __version__
from fabric.bench.command import parser as bench_parser
from fabric.bench.fidelity import parser as fidelity_parser
from fabric.bench.front import parser as front_parser
from fabric.bench.profile import profile_parser
from fabric.bench.tiers import parser as tiers_parser
from fabric.cli import cache_folder, main, parser, serve_config
from fabric.cluster.command import deploy_parser
from fabric.cluster.node import parser as environment_parser
from fabric.journal.benchmark import parser as journal_parser
from fabric.journal.command import parser as replay_parser
from fabric.journal.explain import parser as explain_parser
from fabric.kernels.tune import parser as tune_parser
from fabric.model.flags import eval_parser, quantize_parser
from fabric.sim.benchmark import parser as simulator_parser
from fabric.sim.command import parser as simulate_parser

FLAGS = {
    "fabric": ["--help", "--version"],
    "fabric serve": [
        "--api-key-file",
        "--config",
        "--help",
        "--host",
        "--name",
        "--port",
        "--replicas",
        "MODEL",
    ],
    "fabric chat": [
        "--help",
        "--max-tokens",
        "--model",
        "--system",
        "--temperature",
        "--url",
        "MESSAGE",
    ],
    "fabric status": ["--address", "--help", "--json", "--url"],
    "fabric deploy": ["--address", "--dry-run", "--help", "--serve-config", "CONFIG"],
    "fabric environment": ["--help"],
    "fabric profile": ["--front", "--help", "--output", "MODEL"],
    "fabric simulate": [
        "--compare",
        "--config",
        "--costs",
        "--fast",
        "--help",
        "--html",
        "--journal",
        "--json",
        "--oracle",
        "--profile",
        "--rate",
        "--replicas",
        "--requests",
        "--scale",
        "--seconds",
        "--seed",
        "--seeds",
        "--speed",
        "--trace",
        "--workload",
        "SCENARIO",
    ],
    "fabric explain": ["--help", "--journal", "ID"],
    "fabric replay": ["--help", "FILE"],
    "fabric tune": ["--help", "--output"],
    "fabric eval": ["--against", "--format", "--help", "--text", "--tokens", "--window", "MODEL"],
    "fabric quantize": ["--format", "--help", "--output", "--text", "--tokens", "MODEL"],
    "fabric bench": ["--help"],
    "fabric bench cold-start": ["--help", "--json", "--starts", "--timeout", "--url"],
    "fabric bench disaggregated": [
        "--chat-rate",
        "--chunks",
        "--help",
        "--idle",
        "--json",
        "--prompt-rate",
        "--seconds",
        "--seed",
    ],
    "fabric bench peers": [
        "--concurrency",
        "--gguf",
        "--help",
        "--json",
        "--llama-server",
        "--markdown",
        "--model",
        "--only-peers",
        "--peer",
        "--quick",
        "--rounds",
        "--seed",
        "--workload",
    ],
    "fabric bench journal": [
        "--help",
        "--rounds",
        "--sequences",
        "--step-ms",
        "--steps",
        "--tokens",
    ],
    "fabric bench fidelity": [
        "--costs",
        "--help",
        "--json",
        "--loads",
        "--scale",
        "--seconds",
        "--seed",
        "--trace",
    ],
    "fabric bench front": ["--help", "--json", "--quick", "--seed"],
    "fabric bench prefix-fetch": ["--help", "--json", "--prompts", "--seed", "--tokens"],
    "fabric bench routing": [
        "--help",
        "--json",
        "--load",
        "--rate",
        "--seconds",
        "--seeds",
        "--workload",
    ],
    "fabric bench tiers": ["--help", "--json", "--seconds", "--seed"],
    "fabric bench simulator": [
        "--help",
        "--only",
        "--profile",
        "--rate",
        "--replicas",
        "--requests",
        "--workload",
    ],
    "fabric bench serve": [
        "--concurrency",
        "--e2e-ms",
        "--help",
        "--json",
        "--model",
        "--natural-end",
        "--prompts",
        "--rate",
        "--requests",
        "--seed",
        "--timeout",
        "--tpot-ms",
        "--ttft-ms",
        "--url",
        "--variation",
        "--workload",
    ],
}


def test_no_new_flags() -> None:
    named = (simulate_parser, replay_parser, explain_parser, tune_parser)
    named += (journal_parser, simulator_parser, tiers_parser, front_parser, fidelity_parser)
    cluster = (deploy_parser, environment_parser, profile_parser)
    parsers = (parser, bench_parser, quantize_parser, eval_parser, *named, *cluster)
    assert dict(pair for make in parsers for pair in flags(make())) == FLAGS


def test_a_planted_flag_is_seen() -> None:
    top = parser()
    top.add_argument("--fast")
    assert dict(flags(top))["fabric"] == ["--fast", "--help", "--version"]


HELPS = sorted(name.removeprefix("fabric").strip() for name in FLAGS)


@pytest.mark.parametrize("command", [*HELPS, "bench engine", "bench kernels"])
def test_help_fits_and_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert shown.startswith(f"usage: fabric {command}".rstrip())
    assert re.search(rf"(?m)^  .*\bfabric {command}".rstrip(), shown), "it has no example"
    assert max(len(line) for line in shown.splitlines()) <= 100


def test_version_is_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fabric {__version__}\n"
    written = f'"{__version__}"'
    named = [p for p in ROOT.glob("*.toml") if written in p.read_text(encoding="utf-8")]
    assert not named


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "--port", "70000"], "server.port"),
        (["serve", "--host", "0.0.0.0"], "api_keys"),
        (["serve", "--config", "/nonexistent.yaml"], "can't read /nonexistent.yaml"),
        (["serve", "--api-key-file", "/nonexistent"], "can't read /nonexistent"),
    ],
)
def test_a_wrong_setting_is_one_line_and_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("fabric: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("localhost:9000", "http://localhost:9000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("https://a.example/v1/", "https://a.example"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_address_as_people_write_it(given: str, meant: str) -> None:
    for command in (["status"], ["chat"]):
        assert parser().parse_args([*command, "--url", given]).url == meant
    assert bench_parser().parse_args(["serve", "--url", given]).url == meant


@pytest.mark.parametrize("wrong", ["ftp://a", "http://", "a b", "http://a:x", "http://[::1", ""])
def test_what_is_no_address_is_wrong_usage(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["status"], ["chat"], ["bench", "serve"], ["bench", "cold-start"]):
        with pytest.raises(SystemExit) as left:
            main([*command, "--url", wrong])
        assert left.value.code == 2
        assert "is no address of a server" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["fly"], ["serve", "--fast"], ["serve", "--port", "x"]])
def test_wrong_usage_is_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("usage: fabric")


def test_flags_and_environment_make_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, keys = tmp_path / "a.yaml", tmp_path / "keys"
    file.write_text("server: {port: 9000, api_keys: [old]}\nreplicas: 2\n", encoding="utf-8")
    keys.write_text("# ours\n\n three \n", encoding="utf-8")
    monkeypatch.setenv("FABRIC_API_KEYS", "one, two,")
    words = ["serve", "m", "--config", str(file), "--port", "9001", "--api-key-file", str(keys)]
    config = serve_config(parser().parse_args(words))
    assert config.model.source == "m"
    assert config.server.port == 9001
    assert config.server.api_keys == ("one", "two", "three")
    assert config.replicas == 2


def test_the_cache_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FABRIC_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "fabric"
    monkeypatch.setenv("FABRIC_CACHE", "/y")
    assert cache_folder() == Path("/y")


def flags(top: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """Every (command, its flags and arguments in order)."""
    names = []
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags(command)
        else:
            names.append(action.option_strings[-1] if action.option_strings else action.metavar)
    yield top.prog, sorted(str(name) for name in names)
