"""`fabric serve` with a model that can't be served: one line, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from kit.fabric_server import free_port
from kit.source import ROOT
from kit.tiny_models import make_tiny_model

BROKEN = {
    "absent": "no folder",
    "pickle": "is a pickle",
    "unknown architecture": "XForCausalLM",
    "truncated": "is truncated",
    "misfit": "but the config says",
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Popen[str]]]:
    """All of them at once: each spends its seconds on starting Python."""
    started = {broken: _serve(broken, tmp_path_factory.mktemp("refused")) for broken in BROKEN}
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("broken", BROKEN)
def test_a_model_that_cannot_be_served_is_one_line_and_code_2(
    refusals: dict[str, Popen[str]], broken: str
) -> None:
    process = refusals[broken]
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert BROKEN[broken] in err
    assert err.startswith("fabric: ")
    assert err.count("\n") == 1
    assert not out


def _serve(broken: str, home: Path) -> Popen[str]:
    """`fabric serve` of a model that is broken in this way."""
    folder = home / "model"
    if broken != "absent":
        architecture = {"architectures": ["XForCausalLM"]} if "architecture" in broken else {}
        make_tiny_model(folder)
        config = json.loads((folder / "config.json").read_text()) | architecture
        config |= {"hidden_size": 128} if broken == "misfit" else {}
        (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    if broken == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    if broken == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    return Popen(
        [sys.executable, "-m", "fabric.cli", "serve", "--port", str(free_port()), str(folder)],
        cwd=ROOT,
        env={**os.environ, "FABRIC_CACHE": str(home / "cache")},
        stdout=PIPE,
        stderr=PIPE,
        text=True,
    )
