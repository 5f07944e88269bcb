"""The table of launches, its file, and `fabric tune`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fabric.kernels.launch import Launch
from fabric.kernels.launch_table import (
    LaunchKey,
    LaunchTable,
    head_bucket,
    read_tuned,
    row_bucket,
    tuned_path,
    width_bucket,
    write_tuned,
)
from fabric.kernels.tune import Sizes, candidates, main, tune

SMALL = Sizes(
    hidden=256,
    outputs=64,
    vocab=48,
    heads=2,
    kv_heads=1,
    experts=2,
    sequences=2,
    context=40,
    prompt=20,
)
TILE = (("BLOCK_M", 16), ("BLOCK_N", 64), ("BLOCK_K", 128))
ENTRIES = {
    LaunchKey(operation=operation, form=form, bucket=bucket): Launch(sizes=sizes, stages=2)
    for operation, form, bucket, sizes in (
        ("logits", "bf16", "16 rows", TILE),
        ("moe_gemm", "bf16", "16 rows", TILE),
        ("scaled_gemm", "int8", "16 rows", TILE),
        ("scaled_gemm", "fp8 blocks", "16 rows", TILE),
        ("paged_attention", "fp8", "head 64", (("SPLIT_KEYS", 32), ("BLOCK", 32))),
        ("prefill_attention", "bf16", "head 64", (("ROWS", 64), ("BLOCK", 32))),
    )
}


def test_formats_that_a_target_lacks_are_refused() -> None:
    assert LaunchTable("sm_90").pick("kv_write", "fp8", "any").warps == 4
    for target in ("sm_80", "gfx942"):
        for operation, bucket in (("kv_write", "any"), ("paged_attention", "head 64")):
            with pytest.raises(ValueError, match=f"{target} has no {operation} of fp8"):
                LaunchTable(target).pick(operation, "fp8", bucket)
    with pytest.raises(ValueError, match="there are sm_90"):
        LaunchTable("sm_61")


def test_buckets() -> None:
    assert [row_bucket(rows) for rows in (1, 16, 17, 64, 65)] == [
        *["16 rows"] * 2,
        *["64 rows"] * 2,
        "many rows",
    ]
    assert (width_bucket(96), width_bucket(4097)) == ("128 wide", "16384 wide")
    assert (head_bucket(96), head_bucket(256)) == ("head 128", "head 256")
    with pytest.raises(ValueError, match="rows of"):
        width_bucket(16_385)
    with pytest.raises(ValueError, match="heads of"):
        head_bucket(257)


def test_a_tuned_file_replaces_entries(tmp_path: Path) -> None:
    path = tuned_path(tmp_path, "sm_90")
    key = LaunchKey(operation="rope", form="bf16", bucket="any")
    launch = Launch(sizes=(("HEADS", 2),), warps=1, stages=1)
    write_tuned(path, target="sm_90", device="a GPU", entries={key: launch})
    tuned = read_tuned(path, "sm_90")
    table = LaunchTable("sm_90", tuned)
    assert table.pick("rope", "bf16", "any") == launch
    untouched = LaunchTable("sm_90").pick("silu_mul", "bf16", "any")
    assert table.pick("silu_mul", "bf16", "any") == untouched
    with pytest.raises(ValueError, match="tuned on sm_90"):
        read_tuned(path, "sm_80")
    for text in ("no json", "[]", '{"target": "sm_90", "entries": [{}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="no table of launches"):
            read_tuned(path, "sm_90")


def test_without_a_gpu_tune_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--output", str(tmp_path / "file")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tune_keeps_the_fastest_and_passes_over_what_fails() -> None:
    """Every workload really runs once, small, in the interpreter; the times are made up: the
    entry's own launch does not fit, the next candidate is the fastest."""
    lines: list[str] = []
    tried = 0

    def progress(line: str) -> None:
        nonlocal tried
        lines.append(line)
        tried = tried if line.startswith("  ") else 0

    def timer(work: Callable[[], None]) -> float:
        nonlocal tried
        tried += 1
        if tried == 1:
            work()
            raise RuntimeError("does not fit")
        return 0.5 if tried == 2 else 1.0

    best = tune(ENTRIES, torch.device("cpu"), SMALL, timer=timer, progress=progress)
    assert set(best) == set(ENTRIES)
    assert sum("RuntimeError" in line for line in lines) == len(ENTRIES)
    for key, launch in best.items():
        assert launch == list(candidates(ENTRIES[key]))[1]
