"""The `fabric` command, and what hangs on it: `fabric --help` lists them.

The environment is read here (and in `cluster/app.py`) and nowhere else. Parts are imported inside
the functions that need them: `fabric --help` starts neither Ray nor torch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fabric import __version__
from fabric.core.errors import ConfigError, FabricError, ModelError

if TYPE_CHECKING:
    from fabric.config import FabricConfig
    from fabric.gateway.backend import ServedModel

DEFAULT_URL = "http://127.0.0.1:8000"

OVERVIEW = """\
Serves language models over an OpenAI-compatible HTTP API, on Ray.

  fabric serve                  serve the demo model on http://127.0.0.1:8000
  fabric chat                   talk to it
  fabric bench serve            measure it
  fabric simulate               foretell it, on hardware that is not here
  fabric replay                 play a journal again: every decision must come out the same
  fabric explain ID             why a request waited, where it went, what preempted it
  fabric tune                   time its kernels on this GPU, keep the fastest launches
  fabric deploy CONFIG          put it on a Ray cluster, or change what is there
  fabric status                 see its replicas, memory and queues

`fabric COMMAND --help` tells more."""

ENVIRONMENT = """\
environment:
  FABRIC_CACHE      folder of models, compiled kernels and logs (default: ~/.cache/fabric)
  FABRIC_API_KEYS   serve, deploy: keys that clients must send, separated by commas
  FABRIC_API_KEY    chat, bench, status: the key to send
  HF_TOKEN          serve: access to private models of the Hugging Face hub

exit codes: 0 fine, 1 failed, 2 wrong usage, model or configuration, 130 interrupted"""

SERVE_HELP = """\
Serves one model until Ctrl-C or SIGTERM, which lets running requests finish first.

MODEL is a folder in Hugging Face's format with safetensors weights, a GGUF file or the id of a
model on the Hugging Face hub. Without it the demo model is served, SmolLM2-135M-Instruct.

examples:
  fabric serve
  fabric serve ~/models/Qwen3-0.6B --name qwen3 --port 9000
  fabric serve --config deployments/single.yaml --replicas 2
  fabric serve --host 0.0.0.0 --api-key-file keys.txt

Flags win over the file of --config; deployments/single.yaml shows every key and its default."""

CHAT_HELP = """\
Talks to a running server, streaming. Ctrl-C stops an answer, Ctrl-D ends the conversation.

examples:
  fabric chat
  fabric chat "Name three moons of Jupiter."
  fabric chat --url http://127.0.0.1:9000 --system "Answer in one sentence." """

STATUS_HELP = """\
Shows a running server's model, replicas, bytes of weights and KV pools, and queues.

examples:
  fabric status
  fabric status --json
  fabric status --address auto"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `ENVIRONMENT`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["bench"]:
            own = _elsewhere(" ".join(words[:2]))
            return own(words[2:]) if own else _bench(words[1:])
        if words[:1] in (["eval"], ["quantize"]):
            return _model_command(words[0], words[1:])
        if words[:1] == ["deploy"]:
            from fabric.cluster.command import deploy_main

            return deploy_main(words[1:], _keys_of_environment())
        if words[:1] and (run := _elsewhere(words[0])):
            return run(words[1:])
        arguments = parser().parse_args(words)
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except FabricError as error:
        print(f"fabric: {error}", file=sys.stderr)
        return 2 if isinstance(error, ModelError | ConfigError) else 1
    except BrokenPipeError:  # `fabric status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _elsewhere(command: str) -> Callable[[list[str]], int] | None:
    """The `main` of a command that reads its own words; None for all others."""
    match command:
        case "bench engine":
            from fabric.driver.measuring import engine as main
        case "bench fidelity":
            from fabric.driver.measuring import fidelity as main
        case "bench front":
            from fabric.driver.measuring import front as main
        case "bench journal":
            from fabric.journal.benchmark import main
        case "bench simulator":
            from fabric.sim.benchmark import main
        case "bench tiers":
            from fabric.driver.measuring import tiers as main
        case "environment":
            from fabric.cluster.node import main
        case "explain":
            from fabric.journal.explain import main
        case "profile":
            from fabric.driver.measuring import profile as main
        case "replay":
            from fabric.journal.command import main
        case "simulate":
            from fabric.sim.command import main
        case "tune":
            from fabric.kernels.tune import main
        case _:
            return None
    return main


def parser() -> argparse.ArgumentParser:
    """Every command and flag; tests/law/test_cli.py freezes them: settings go into a file."""
    top = argparse.ArgumentParser(
        prog="fabric",
        description=OVERVIEW,
        epilog=ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"fabric {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(_command(commands, "serve", "serve a model", SERVE_HELP))
    _add_chat(_command(commands, "chat", "talk to a running server", CHAT_HELP))
    # `main` hands everything after these to their own parsers, in fabric/bench, sim, model …
    commands.add_parser("bench", help="measure any OpenAI-compatible server", add_help=False)
    commands.add_parser("simulate", help="run it under a virtual clock", add_help=False)
    commands.add_parser("profile", help="measure steps for `simulate --costs`", add_help=False)
    commands.add_parser("replay", help="play a journal again", add_help=False)
    commands.add_parser("explain", help="what became of a request, and why", add_help=False)
    commands.add_parser("tune", help="time GPU kernels, keep the fastest launches", add_help=False)
    commands.add_parser("quantize", help="write fp8, int8 or int4 weights", add_help=False)
    commands.add_parser("eval", help="measure a model on a text", add_help=False)
    commands.add_parser("deploy", help="apply a configuration to a Ray cluster", add_help=False)
    commands.add_parser("environment", help="what a cluster's node needs", add_help=False)
    _add_status(_command(commands, "status", "show a running server's state", STATUS_HELP))
    return top


def _command(commands: Any, name: str, summary: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def _add_serve(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder, GGUF file or hub id (default: demo model)",
    )
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    command.add_argument("--name", help="the model's name in the API (default: from MODEL)")
    command.add_argument("--host", help="address to bind (default: 127.0.0.1)")
    command.add_argument("--port", type=int, help="port to bind (default: 8000)")
    command.add_argument("--replicas", type=int, help="engines to run (default: 1)")
    command.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys that clients must send, one a line"
    )
    command.set_defaults(run=_serve)


def _add_chat(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "message", nargs="?", metavar="MESSAGE", help="ask this and leave (default: a conversation)"
    )
    _add_url(command)
    command.add_argument("--model", help="the model's name (default: the server's first)")
    command.add_argument("--system", metavar="TEXT", help="the system message (default: none)")
    command.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="longest answer (default: what the context allows)",
    )
    command.add_argument("--temperature", type=float, metavar="T", help="(default: the server's)")
    command.set_defaults(run=_chat)


def _add_status(command: argparse.ArgumentParser) -> None:
    _add_url(command)
    command.add_argument("--address", help="of a Ray cluster, on one of its nodes: its nodes too")
    command.add_argument("--json", action="store_true", help="the whole record, for programs")
    command.set_defaults(run=_status)


def _add_url(command: argparse.ArgumentParser) -> None:
    from fabric.bench.address import server_address

    command.add_argument(
        "--url", type=server_address, default=DEFAULT_URL, help="the server (default: %(default)s)"
    )


def _serve(arguments: argparse.Namespace) -> int:
    config = serve_config(arguments)
    with _ModelSearch(config) as model:
        from fabric.cluster.launcher import serve

        # A model that can't be served is refused before Ray starts.
        return serve(config, model.result, cache=cache_folder())


def _chat(arguments: argparse.Namespace) -> int:
    from fabric.bench.chat import ChatOptions, chat

    return chat(
        ChatOptions(
            url=arguments.url,
            api_key=_client_key(),
            model=arguments.model,
            message=arguments.message,
            system=arguments.system,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
        )
    )


def _bench(words: list[str]) -> int:
    from fabric.bench.command import Surroundings, run

    surroundings = Surroundings(
        model_folder=_demo_folder,
        api_key=_client_key(),
        others={"kernels": _bench_kernels},
    )
    return run(words, surroundings)


def _model_command(name: str, words: Sequence[str]) -> int:
    from fabric.gateway.tokenizer import tokens_of_text
    from fabric.model.command import Surroundings, evaluation, quantize
    from fabric.model.progress import ProgressBar

    run = quantize if name == "quantize" else evaluation
    return run(words, Surroundings(tokens_of_text, cache_folder(), ProgressBar()))


def _bench_kernels(words: Sequence[str]) -> int:
    from fabric.kernels.benchmark import main as measure

    measure(words)
    return 0


def _demo_folder() -> Path:
    from fabric.model.progress import ProgressBar
    from fabric.model.source import resolve_model

    return resolve_model(None, cache_folder(), ProgressBar()).path


def _status(arguments: argparse.Namespace) -> int:
    if arguments.address:
        from fabric.cluster.nodes import cluster_status

        return cluster_status(arguments.address, as_json=arguments.json)
    from fabric.cluster.status import status

    return status(arguments.url, api_key=_client_key(), as_json=arguments.json)


def serve_config(arguments: argparse.Namespace) -> FabricConfig:
    """The file of --config with the flags and `FABRIC_API_KEYS` on top. Raises `ConfigError`."""
    from fabric.config import override, parse_config, read_config

    keys = _keys_of_environment()
    if arguments.api_key_file:
        keys += _keys_of(arguments.api_key_file)
    flags = {
        "model.source": arguments.model,
        "model.name": arguments.name,
        "server.host": arguments.host,
        "server.port": arguments.port,
        "server.api_keys": keys or None,
        "replicas": arguments.replicas,
    }
    data = read_config(arguments.config) if arguments.config else {}
    return parse_config(override(data, {key: v for key, v in flags.items() if v is not None}))


class _ModelSearch:
    """`served_model` in a child process, while this one imports Ray: it needs torch, whose 150 MB
    would otherwise stay in the launcher for as long as it serves."""

    CHILD = "from fabric.cli import print_model; print_model()"

    def __init__(self, config: FabricConfig) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", self.CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._child.stdin is not None
        self._child.stdin.write(config.model_dump_json(include={"model", "shard"}).encode())
        self._child.stdin.close()
        self._child.stdin = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()  # nothing, if it has ended
        self._child.wait()

    def result(self) -> ServedModel:
        """Wait for it. Raises `ModelError`."""
        from fabric.gateway.backend import ServedModel

        answer = self._child.communicate()[0]
        if self._child.returncode:
            raise ModelError("the model could not be checked; the reason stands above")
        found = json.loads(answer)
        if "error" in found:
            raise ModelError(found["error"])
        return ServedModel(**found | {"eos_token_ids": tuple(found["eos_token_ids"])})


def print_model() -> None:
    """The child of `_ModelSearch`: settings on stdin, a `ServedModel` or an error on stdout."""
    from dataclasses import asdict

    from fabric.config import FabricConfig
    from fabric.driver import served_model

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    settings = FabricConfig.model_validate_json(sys.stdin.read())
    with redirect_stdout(sys.stderr):  # whatever a library has to say is no part of the answer
        try:
            answer = asdict(served_model(settings, cache_folder()))
        except ModelError as error:
            answer = {"error": str(error)}
    print(json.dumps(answer))


def cache_folder() -> Path:
    """Where models and logs are kept between runs; made when first written to."""
    return Path(os.environ.get("FABRIC_CACHE") or "~/.cache/fabric").expanduser()


def _client_key() -> str | None:
    return os.environ.get("FABRIC_API_KEY") or None


def _keys_of_environment() -> list[str]:
    return [key.strip() for key in os.environ.get("FABRIC_API_KEYS", "").split(",") if key.strip()]


def _keys_of(path: Path) -> list[str]:
    """The keys in a file: one a line; empty lines and lines that begin with # don't count."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file: can't read {path}: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file: {path} holds no key")
    return keys


if __name__ == "__main__":
    sys.exit(main())
