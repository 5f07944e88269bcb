"""Fidelity: kernel tables read and interpolated, a recorded run on a GPU foretold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fabric.sim.command import main
from fabric.sim.costs import StepShape, profile
from fabric.sim.kernel_tables import KernelTables, read_kernel_tables
from fabric.sim.oracle import fidelity

ORACLE = Path(__file__).parent.parent / "data" / "oracle_rtx4090"
US = 1000


@pytest.fixture(scope="module")
def tables() -> KernelTables:
    return read_kernel_tables(ORACLE, 1)


def test_a_step_is_the_sum_of_its_kernels(tables: KernelTables) -> None:
    """64 decodes at a context of 512: every figure stands in the files."""
    once = 2.67733 + 2.826  # embedding, last norm
    layer = 3.18867 + 144.363 + 279.041 + 2 * 2.35717 + 48.8287 + 60.1343 + 2.43167
    rest = tables.per_sequence[[x for x, _ in tables.per_sequence].index(64)][1]
    shape = StepShape(rows=64, tokens=64, context=64 * 512, pairs=0, copies=0)
    expected = once + layer + rest + 191.925
    assert tables.step_ns(shape) == pytest.approx(expected * US, abs=US)
    slower = replace(tables, overhead_ns=5 * US)
    assert slower.step_ns(shape) == tables.step_ns(shape) + 5 * US


def test_attention_is_linear_between_what_was_measured(tables: KernelTables) -> None:
    assert tables.attention_us((512, 512, 64, 512)) == pytest.approx(457.377)
    assert tables.attention_us((512, 512, 0, 0)) == pytest.approx(73.563)
    between = (tables.attention_us((0, 0, 64, 512)) + tables.attention_us((0, 0, 64, 1024))) / 2
    assert tables.attention_us((0, 0, 64, 768)) == pytest.approx(between)


def test_a_chunk_counts_by_what_lies_before_it(tables: KernelTables) -> None:
    shape = StepShape(
        rows=1, tokens=512, context=1024, pairs=0, copies=0,
        chunks=1, chunk_tokens=512, chunk_context=1024,
    )  # fmt: skip
    first = replace(shape, context=512, chunk_context=512)
    took = tables.step_ns(shape) - tables.step_ns(first)
    assert took == pytest.approx((73.563 - 41.0747) * US, abs=US)


def test_a_folder_that_is_no_oracle_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--oracle", str(tmp_path)]) == 2
    (tmp_path / "dense.csv").write_text("layer,time_us\n")
    assert main(["--oracle", str(tmp_path)]) == 2
    assert "no column tokens" in capsys.readouterr().err


def test_fp8_halves_the_weights_and_nothing_else() -> None:
    plain, small = profile("H100:llama-8b"), profile("H100:llama-8b:1:fp8")
    one = StepShape(rows=1, tokens=1, context=0, pairs=0, copies=0)
    fixed = 4_000_000
    ratio = (plain.costs.step_ns(one) - fixed) / (small.costs.step_ns(one) - fixed)
    assert ratio == pytest.approx(2.0, rel=0.01)
    assert small.engine.num_blocks > plain.engine.num_blocks
    with pytest.raises(ValueError, match="does not multiply fp8"):
        profile("A100:llama-8b:1:fp8")
    assert profile("H100:llama-70b:4").gpus == 4


@pytest.mark.nightly
def test_a_recorded_run_is_foretold() -> None:
    """300 requests, three times what the GPU can take. `prefill` and `queue` are only reported."""
    found = fidelity(ORACLE)
    assert found.met, found.render()
    assert 0 < found.overhead_ns < 5_000_000
