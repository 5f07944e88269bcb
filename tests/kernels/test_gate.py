"""The compile gate: what it accepts, and that it can refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kit.source import ROOT

from fabric.kernels.gate.cases import cases
from fabric.kernels.gate.compiler import build
from fabric.kernels.gate.hardware import H100, Work
from fabric.kernels.launch_table import LaunchTable


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Outside of the interpreter, in which this process runs kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    return subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_bad_launches_are_refused_for_their_reasons(tmp_path: Path) -> None:
    done = run("-m", "kit.bad_launches", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    reasons, name = {}, ""
    for line in done.stdout.splitlines():
        if line.startswith("  FAILS: "):
            reasons[name] = line
        else:
            name = re.split(r"\s{2,}", line)[0]
    assert "spilling instructions" in reasons["spills"]
    assert "shared memory, a block has 232448" in reasons["shared memory"]
    assert "no TMA" in reasons["expects TMA"]
    assert "does not compile" in reasons["odd block"]
    assert "does not compile" in reasons["no kernel"]
    assert len(reasons) == 5 and "good" not in reasons
    assert "6 launches compiled, 5 bad" in done.stdout


def test_nothing_to_compile_is_a_failure() -> None:
    assert run("-m", "fabric.kernels.gate", "--only", "no such launch").returncode == 1


def test_interpreted_kernels_are_no_proof(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        build(cases("sm_90")[0], tmp_path)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_entry_of_the_table_is_a_case(target: str) -> None:
    labels = {case.label for case in cases(target)}
    for key in LaunchTable(target).entries():
        assert f"{key.operation} {key.form} {key.bucket}" in labels


def test_arithmetic_of_the_hardware() -> None:
    """128 registers, 8 warps: 32,768 a block, so two; 100 KB of shared memory: two as well."""
    assert H100.resident_blocks(registers=128, shared_bytes=0, warps=8) == 2
    assert H100.resident_blocks(registers=32, shared_bytes=100 * 1024, warps=4) == 2
    assert H100.resident_blocks(registers=255, shared_bytes=0, warps=16) == 0
    memory = Work(shape="", bytes=3.35e6, operations=1.0, unit="bf16")
    assert H100.roofline_us(memory) == pytest.approx(1.0)
    compute = Work(shape="", bytes=1.0, operations=989e6, unit="bf16")
    assert H100.roofline_us(compute) == pytest.approx(1.0)
    assert H100.estimate_us(compute) > H100.roofline_us(compute)
