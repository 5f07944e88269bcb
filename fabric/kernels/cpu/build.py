"""Compiles the C++ files of this folder into one shared library, once per machine and source.

The library has a plain C ABI and no torch headers, so it builds in seconds. It lands in a private
cache folder under a name that is a hash of everything that shapes it: sources, compiler, flags and
the CPU's feature list. A file lock makes concurrent starts build it once; the rename is atomic.

Only the instruction sets that this CPU has are compiled: templates and inline functions that were
compiled for a wider set can then never be picked by the linker on a CPU that lacks it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE_FOLDER = Path(__file__).parent
COMPILE_TIMEOUT_S = 300

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512_BF16 = (
    *_AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512bf16",
    "-mavx512vnni",
)
_AMX = (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16")
# Contraction off: the compiler must not fuse a multiply and an add in one template instance and
# leave them apart in another, or the same row would differ between batch sizes.
_COMMON = ("-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionSet:
    """One path: `isa_<name>.cpp`, the compiler flags and the cpuinfo flags that it needs."""

    name: str
    compiler_flags: tuple[str, ...]
    cpu_flags: frozenset[str]


_AVX512_CPU = frozenset(
    {
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512dq",
        "avx512_bf16",
        "avx512_vnni",
    }
)
INSTRUCTION_SETS = (  # best first
    InstructionSet(
        name="amx",
        compiler_flags=_AMX,
        cpu_flags=_AVX512_CPU | {"amx_tile", "amx_bf16"},
    ),
    InstructionSet(name="avx512_bf16", compiler_flags=_AVX512_BF16, cpu_flags=_AVX512_CPU),
    InstructionSet(name="avx2", compiler_flags=_AVX2, cpu_flags=frozenset({"avx2", "fma", "f16c"})),
)


class BuildError(RuntimeError):
    """The library could not be built here; the message says why. The torch path still works."""


Progress = Callable[[str], None]


def default_cache_folder() -> Path:
    """Where compiled libraries are kept when the caller names no folder."""
    return Path.home() / ".cache" / "fabric" / "kernels"


def build_library(
    cache_folder: Path | None = None,
    *,
    compiler: str = "g++",
    progress: Progress | None = None,
) -> Path:
    """The path of the compiled library, building it first if need be.

    Raises `BuildError` when there is no compiler, no supported instruction set, the folder can't
    be used, or compiling fails.
    """
    folder = cache_folder or default_cache_folder()
    available = supported_instruction_sets()
    if not available:
        raise BuildError("this CPU has neither AVX2 with FMA and F16C, AVX512_BF16 nor AMX")
    executable = shutil.which(compiler)
    if executable is None:
        raise BuildError(f"no C++ compiler: {compiler!r} was not found on the path")
    try:
        _make_private(folder)
        target = folder / f"fabric_cpu_{_fingerprint(executable)}.so"
        if target.exists():
            return target
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                if progress is not None:
                    names = ", ".join(isa.name for isa in available)
                    progress(f"compiling the CPU kernels ({names}); done once per machine")
                _compile(executable, target, available)
    except OSError as error:  # a read-only home, a full disk
        raise BuildError(f"cannot build in the kernel cache folder {folder}: {error}") from error
    return target


def load_library(
    cache_folder: Path | None = None,
    *,
    compiler: str = "g++",
    progress: Progress | None = None,
) -> ctypes.CDLL:
    """The library of this machine, built if need be and loaded once per process.

    Raises `BuildError` as `build_library` does, and when the library can't be loaded.
    """
    path = build_library(cache_folder, compiler=compiler, progress=progress)
    try:
        return _load(str(path))
    except OSError as error:  # a folder mounted noexec
        raise BuildError(f"cannot load the compiled kernels: {error}") from error


def supported_instruction_sets() -> tuple[InstructionSet, ...]:
    """What this CPU can run, best first."""
    flags = _cpu_flags()
    return tuple(isa for isa in INSTRUCTION_SETS if isa.cpu_flags <= flags)


@cache
def _load(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


@cache
def _fingerprint(executable: str) -> str:
    version = subprocess.run(
        [executable, "--version"], capture_output=True, text=True, timeout=30, check=False
    ).stdout
    digest = hashlib.sha256(version.encode())
    digest.update(" ".join(sorted(_cpu_flags())).encode())
    digest.update(Path(__file__).read_bytes())  # the flags above
    for source in sorted([*SOURCE_FOLDER.glob("*.h"), *SOURCE_FOLDER.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _make_private(folder: Path) -> None:
    """A library from a folder that others may write to would be somebody else's code."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise BuildError(f"the kernel cache folder {folder} belongs to another user")
    if stat.S_IMODE(status.st_mode) & 0o077:
        folder.chmod(0o700)


def _compile(executable: str, target: Path, available: tuple[InstructionSet, ...]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build_") as name:
        scratch = Path(name)
        commands = []
        objects = []
        for source in sorted(SOURCE_FOLDER.glob("*.cpp")):
            flags = _flags_for(source.stem, available)
            if flags is None:
                continue
            objects.append(str(scratch / f"{source.stem}.o"))
            commands.append([executable, *_COMMON, *flags, "-c", str(source), "-o", objects[-1]])
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(_run, commands))
        library = scratch / target.name
        _run([executable, "-shared", *objects, "-o", str(library), "-lpthread"])
        library.rename(target)


def _flags_for(stem: str, available: tuple[InstructionSet, ...]) -> tuple[str, ...] | None:
    """None: not for this CPU. Files that are not of one instruction set get the CPU's widest."""
    if not stem.startswith("isa_"):
        return available[0].compiler_flags
    for isa in available:
        if stem == f"isa_{isa.name}":
            return isa.compiler_flags
    return None


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler did not run: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"the C++ compiler failed:\n{done.stderr.strip()[-2000:]}")
