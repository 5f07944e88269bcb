"""Launches that the compile gate must refuse, each for another reason; run by a test."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from fabric.kernels.gate.__main__ import judge
from fabric.kernels.gate.cases import cases
from fabric.kernels.gate.compiler import Case


def bad_launches() -> list[Case]:
    """Good launches of the table, each with one thing spoiled."""
    good = {case.label: case for case in cases("sm_90")}
    prefill = good["prefill_attention bf16 head 256"]
    head = good["logits bf16 64 rows"]
    norm = good["rms_norm bf16 1024 wide"]
    return [
        replace(norm, label="good"),
        replace(prefill, label="spills", warps=4),
        replace(head, label="shared memory", stages=12),
        replace(norm, label="expects TMA", expected=("TMA",)),
        replace(norm, label="odd block", constants=(*norm.constants[:-1], ("BLOCK", 1000))),
        replace(norm, label="no kernel", kernel="no_such_kernel"),
    ]


if __name__ == "__main__":
    sys.exit(judge(bad_launches(), cache_folder=Path(sys.argv[1]), jobs=2))
