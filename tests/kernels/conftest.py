"""Triton kernels run in its interpreter here, which is chosen when triton is first imported."""

from __future__ import annotations

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels needs its own process: python tests/suite.py kernels")
os.environ["TRITON_INTERPRET"] = "1"

from kit.interpreter import mend_interpreter

mend_interpreter()
