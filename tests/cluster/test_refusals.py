"""`fabric serve` with a model that can't be served: one line, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kit.source import ROOT


@pytest.mark.parametrize("broken", ["absent", "pickle", "architecture"])
def test_a_model_that_cannot_be_served_is_one_line_and_code_2(broken: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if broken != "absent":
        folder.mkdir()
        name = "XForCausalLM" if broken == "architecture" else "LlamaForCausalLM"
        (folder / "config.json").write_text(json.dumps({"architectures": [name]}))
        suffix = "safetensors" if broken == "architecture" else "bin"
        (folder / f"model.{suffix}").write_bytes(b"")
    command = [sys.executable, "-m", "fabric.cli", "serve", str(folder)]
    environment = {**os.environ, "FABRIC_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 2
    assert run.stderr.startswith("fabric: ")
    assert run.stderr.count("\n") == 1
    assert not run.stdout
