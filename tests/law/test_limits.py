"""Rule 3: limits on the tail. One that hurts means a missing noun: split by noun."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from kit.source import ROOT, FunctionNode, Source, functions, planted, sources, uphold

FILE_LINES = 400
NATIVE_FILE_LINES = 500  # C++: declarations and intrinsics need more room than Python
FUNCTION_LINES = 60
KERNEL_LINES = 120
LINE_CHARACTERS = 100
# Keyword-only parameters count too: a call with seven names in it misses a record as much as one
# with seven positions. `self`, `cls` and the arguments of a Triton kernel (pointers, strides and
# compile-time constants: its ABI) do not.
PARAMETERS = 6
NOT_A_NOUN = ("utils", "util", "helpers", "helper", "common", "misc")


@pytest.mark.parametrize("folder", ["fabric", "tests"])
def test_limits(folder: str) -> None:
    uphold(line for source in sources(folder) for line in limit_violations(source))


def test_limits_of_native_files() -> None:
    files = [path for path in (ROOT / "fabric").rglob("*") if path.suffix in (".cpp", ".h")]
    uphold(line for path in sorted(files) for line in native_violations(path))


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n" * (FILE_LINES + 1),
        "def f():\n" + "    x = 1\n" * FUNCTION_LINES,
        "x = '" + "a" * LINE_CHARACTERS + "'",
        "def f(a, b, c, *, d, e, f, g): ...",
        "class A:\n    def f(self, a, b, c, d, e, f, *g): ...",
    ],
)
def test_a_planted_excess_is_caught(text: str) -> None:
    assert len(limit_violations(planted(text))) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fabric.model.parts", "class A:\n    def f(self, a, b, c, d, e, f): ..."),
        ("fabric.kernels.norm", "def f():\n" + "    x = 1\n" * (KERNEL_LINES - 1)),
        ("fabric.kernels.norm", "@triton.jit\ndef f(a, b, c, d, e, f, g, BLOCK): ..."),
        ("fabric.kernels.norm", "@triton.jit()\ndef f(a, b, c, d, e, f, g, BLOCK): ..."),
    ],
)
def test_what_is_within_the_limits_passes(module: str, text: str) -> None:
    assert not limit_violations(planted(text, module))


def test_a_folder_of_leftovers_is_caught() -> None:
    assert len(limit_violations(planted("", "fabric.model.utils"))) == 1


def test_a_native_file_too_long_or_wide_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "big.cpp"
    path.write_text("\n" * NATIVE_FILE_LINES + "x" * (LINE_CHARACTERS + 1) + "\n")
    assert len(native_violations(path)) == 2


def limit_violations(source: Source) -> list[str]:
    """One line for each limit that a file, its functions and its lines go over."""
    broken = _text_violations(source.path, source.text, FILE_LINES)
    if source.module.split(".")[-1] in NOT_A_NOUN:
        broken.append(f"{source.path}: name the file for the noun it holds")
    in_kernels = source.module.startswith("fabric.kernels")
    limit = KERNEL_LINES if in_kernels else FUNCTION_LINES
    for function in functions(source):
        where = f"{source.at(function)}: {function.name}"
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines > limit:
            broken.append(f"{where} has {lines} lines (limit {limit})")
        count = _parameter_count(function)
        if count > PARAMETERS and not (in_kernels and _is_triton(function)):
            broken.append(
                f"{where} has {count} parameters (limit {PARAMETERS}): a record is missing"
            )
    return broken


def native_violations(path: Path) -> list[str]:
    """The same for a C++ file: length and line width."""
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return _text_violations(name, path.read_text(encoding="utf-8"), NATIVE_FILE_LINES)


def _text_violations(name: str, text: str, file_lines: int) -> list[str]:
    lines = text.splitlines()
    broken = [
        f"{name}:{number}: {len(line)} characters (limit {LINE_CHARACTERS})"
        for number, line in enumerate(lines, start=1)
        if len(line) > LINE_CHARACTERS
    ]
    if len(lines) > file_lines:
        broken.append(f"{name}: {len(lines)} lines (limit {file_lines}): split it by noun")
    return broken


def _parameter_count(function: FunctionNode) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    if arguments.args and arguments.args[0].arg in ("self", "cls"):
        named.remove(arguments.args[0])
    return len(named) + (arguments.vararg is not None) + (arguments.kwarg is not None)


def _is_triton(function: FunctionNode) -> bool:
    calls = [d.func if isinstance(d, ast.Call) else d for d in function.decorator_list]
    return any(isinstance(call, ast.Attribute) and call.attr == "jit" for call in calls)
