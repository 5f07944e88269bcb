"""Where the C++ path must run and does not, a test fails: a skip would hide the main promise."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

from fabric.kernels.cpu.build import supported_instruction_sets


def without_cpp(what: str) -> NoReturn:
    """Fail in CI, and where a compiler and a fit CPU are at hand; else skip."""
    if os.environ.get("CI") or (shutil.which("g++") and supported_instruction_sets()):
        pytest.fail(f"{what}: the C++ path must run here")
    pytest.skip(f"{what}: no C++ compiler here, or no instruction set for it")
