"""`fabric serve` with a model that can't be served: one line, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kit.source import ROOT
from kit.tiny_models import make_tiny_model

BROKEN = {
    "absent": "no folder",
    "pickle": "is a pickle",
    "unknown architecture": "XForCausalLM",
    "truncated": "is truncated",
    "misfit": "but the config says",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_model_that_cannot_be_served_is_one_line_and_code_2(broken: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
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
    command = [sys.executable, "-m", "fabric.cli", "serve", str(folder)]
    environment = {**os.environ, "FABRIC_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 2
    assert BROKEN[broken] in run.stderr
    assert run.stderr.startswith("fabric: ")
    assert run.stderr.count("\n") == 1
    assert not run.stdout
