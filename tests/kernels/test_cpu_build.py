"""Compiling, caching and falling back; the thread pool at rest."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from kit.cpp import without_cpp
from kit.paged import PagedRun, Piece

from fabric.kernels.cpu import build
from fabric.kernels.cpu.build import (
    BuildError,
    build_library,
    load_library,
    supported_instruction_sets,
)
from fabric.kernels.cpu.executor import CpuExecutor
from fabric.kernels.executor import create_executor
from fabric.kernels.host_memory import huge_page_bytes
from fabric.kernels.random_program import ProgramShape, random_program
from fabric.kernels.sampling import TorchSampling
from fabric.kernels.sampling_kernels import create_sampling
from fabric.kernels.torch_executor import TorchExecutor

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
needs_cpp = pytest.mark.skipif(not supported_instruction_sets(), reason="no instruction set")


def _build_and_report(folder: Path, lines: multiprocessing.Queue[str]) -> None:
    build_library(folder, progress=lines.put)


def test_the_cpp_path_can_be_tried_here() -> None:
    """The other tests skip what a desk may lack; in CI nothing may be lacking."""
    if not supported_instruction_sets() or shutil.which("g++") is None:
        without_cpp("tests of the C++ path")


@needs_compiler
@pytest.mark.parametrize(
    ("name", "instructions"),
    [
        ("avx512_bf16", ("vpdpbusd", "vpdpwssd", "vdpbf16ps")),
        pytest.param("amx", ("vpdpbusd", "vpdpwssd", "tdpbf16ps"), marks=pytest.mark.nightly),
    ],
)
def test_what_this_cpu_may_lack_compiles_to_its_instructions(
    tmp_path: Path, name: str, instructions: tuple[str, ...]
) -> None:
    """VNNI's products of bytes and of words, on a machine that could not run them."""
    (isa,) = (each for each in build.INSTRUCTION_SETS if each.name == name)
    listing = tmp_path / "listing.s"
    flags = ("-std=c++20", "-O1", "-fPIC", "-S", "-o", str(listing), *isa.compiler_flags)
    source = build.SOURCE_FOLDER / f"isa_{name}.cpp"
    subprocess.run(["g++", *flags, str(source)], check=True, timeout=build.COMPILE_TIMEOUT_S)
    text = listing.read_text()
    assert [each for each in instructions if each not in text] == []


@needs_cpp
def test_concurrent_starts_compile_once_into_a_private_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "_COMMON", ("-std=c++20", "-O0", "-fPIC"))  # a third of the time
    folder = tmp_path / "kernels"
    context = multiprocessing.get_context("fork")
    lines: multiprocessing.Queue[str] = context.Queue()
    starts = [
        context.Process(target=_build_and_report, args=(folder, lines), daemon=True)
        for _ in range(2)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join(timeout=100)
        assert start.exitcode == 0
    assert "compiling" in lines.get(timeout=5)
    assert lines.empty()
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".so"]  # the lock, the library
    assert folder.stat().st_mode & 0o777 == 0o700


@needs_cpp
def test_a_cache_folder_of_others_is_made_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        build_library(tmp_path, compiler="no-such-compiler")
    assert tmp_path.stat().st_mode & 0o777 == 0o777  # nothing was to be stored
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'does not compile' >&2; exit 1\n")
    broken.chmod(0o700)
    with pytest.raises(BuildError, match="does not compile"):
        build_library(tmp_path, compiler=str(broken))
    assert tmp_path.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.glob("*.so"))


def test_without_a_compiler_torch_takes_over_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        executor = create_executor(
            random_program(ProgramShape()),
            device="cpu",
            cache_folder=tmp_path,
            compiler="no-such-compiler",
        )
    assert isinstance(executor, TorchExecutor)
    assert "C++ path is off" in caplog.text


@needs_cpp
def test_in_an_impossible_cache_folder_torch_takes_over_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "kernels"
    with pytest.raises(BuildError, match="kernels"):
        build_library(folder)
    with caplog.at_level(logging.WARNING):
        executor = create_executor(
            random_program(ProgramShape()), device="cpu", cache_folder=folder
        )
        sampling = create_sampling(torch.device("cpu"), folder)
    assert isinstance(executor, TorchExecutor)
    assert isinstance(sampling, TorchSampling)
    assert "C++ path is off" in caplog.text
    assert "C++ sampling is off" in caplog.text


@needs_cpp
def test_a_library_that_does_not_load_is_a_build_error(tmp_path: Path) -> None:
    """As on a folder mounted noexec: the file is there, the loader refuses it."""
    script = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo "no library" > "$2"; shift; done'
    compiler = _compiler(tmp_path, f"{script}; exit 0")
    with pytest.raises(BuildError, match="cannot load"):
        load_library(tmp_path / "kernels", compiler=compiler)


@needs_cpp
def test_sampling_says_that_it_compiles_and_that_it_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _compiler(tmp_path, "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    lines: list[str] = []
    with caplog.at_level(logging.WARNING):
        kernels = create_sampling(torch.device("cpu"), tmp_path / "kernels", progress=lines.append)
    assert isinstance(kernels, TorchSampling)
    assert [line.partition(" ")[0] for line in lines] == ["compiling"]
    assert "C++ sampling is off" in caplog.text


def _compiler(folder: Path, script: str) -> str:
    """A shell script in the compiler's place."""
    path = folder / "g++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


def test_float32_runs_in_torch_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    program = random_program(ProgramShape(), dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        assert isinstance(create_executor(program, device="cpu"), TorchExecutor)
    assert not caplog.records


def test_a_cpu_without_the_instruction_sets_falls_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "_cpu_flags", lambda: frozenset({"fpu", "sse2"}))
    with pytest.raises(BuildError, match="AVX2"):
        build_library(tmp_path)
    executor = create_executor(random_program(ProgramShape()), device="cpu", cache_folder=tmp_path)
    assert isinstance(executor, TorchExecutor)


@needs_cpp
def test_the_best_instruction_set_is_taken_and_named() -> None:
    executor = create_executor(random_program(ProgramShape()), device="cpu", threads=1)
    assert isinstance(executor, CpuExecutor)
    assert supported_instruction_sets()[0].name in executor.description


@needs_cpp
def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    with pytest.raises(BuildError, match="sve"):
        CpuExecutor(random_program(ProgramShape()), threads=1, isa="sve")


@needs_cpp
def test_idle_workers_sleep() -> None:
    """Between steps the pool's threads wait on a futex: a spinning one would use a core in full.

    CPU time, not wall time: other processes do not count.
    """
    executor = CpuExecutor(random_program(ProgramShape()), threads=4)
    PagedRun(executor).step(Piece(row=0, first=0, tokens=[1, 2, 3]))
    before_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before_s < 0.1


def test_huge_page_bytes_are_zero_writable_and_shaped() -> None:
    pool_XB = huge_page_bytes((3, 1 << 20))
    assert pool_XB.shape == (3, 1 << 20)
    assert not pool_XB.any()
    pool_XB[2, -1] = 7
    assert pool_XB.view(torch.int32)[2, -1] == 7 << 24
    assert huge_page_bytes((0, 64)).shape == (0, 64)
