"""What `fabric serve` prints once it serves."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from fabric.cluster.launcher import welcome
from fabric.cluster.run import Run
from fabric.cluster.server import Server
from fabric.config import parse_config
from fabric.gateway.backend import ServedModel

MODEL = ServedModel(
    name="Ann's model",
    version="1",
    created=0,
    context_limit=64,
    vocab=10,
    eos_token_ids=(),
    folder="/",
)


def test_the_curl_line_is_one_command_whatever_the_names(tmp_path: Path) -> None:
    for host, key, url in (
        ("127.0.0.1", None, "http://127.0.0.1:8000"),
        ("::1", None, "http://[::1]:8000"),
        ("0.0.0.0", "k", "http://127.0.0.1:8000"),
    ):
        config = parse_config({"server": {"host": host, "api_keys": [key] if key else []}})
        run = Run(folder=tmp_path, logs=tmp_path, cache=tmp_path, launcher_pid=None)
        text = welcome(Server(config, MODEL, run))
        curl, address, *flags = shlex.split(text[text.index("  curl ") :].replace("\\\n", ""))
        assert (curl, address) == ("curl", f"{url}/v1/chat/completions")
        assert flags[::2] == ["-H", *(["-H"] if key else []), "-d"]
        assert json.loads(flags[-1])["model"] == "Ann's model"
        assert f"on {url} " in text and f"Logs: {tmp_path}" in text
