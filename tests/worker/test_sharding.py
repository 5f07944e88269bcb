"""A model over several workers, each a real process: the logits of the worker that has it all.

Every way to spread it: tensor, pipeline, and both; evenly and unevenly; shared memory and gloo.
On the C++ path one to four tensor-parallel workers give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from kit.paged import PagedRun, Piece
from kit.quantized_models import checkpoint
from kit.ranks import free_port, group_name, run_ranks
from kit.tiny_models import VOCAB, make_tiny_model

from fabric.core.shard import Place, ShardSpec
from fabric.worker.links import GroupAddress, open_links
from fabric.worker.runner import KernelBuild, Runner

Logits = numpy.ndarray[Any, numpy.dtype[numpy.float32]]
SPECS = {
    "tp 2": ShardSpec(tp=2),
    "tp 3": ShardSpec(tp=3),
    "pp 2": ShardSpec(pp=2),
    "pp 3": ShardSpec(pp=3),
    "tp 2 x pp 2": ShardSpec(tp=2, pp=2),
    "tp 2 x pp 2 over gloo": ShardSpec(tp=2, pp=2),
}
DTYPES = {"bfloat16": "C++", "float32": "torch"}
# As uneven as SmolLM2: 9 heads in 3 groups, 3 layers; a head and an MLP that 2 and 3 divide badly.
SHAPE = {
    "hidden_size": 96,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "intermediate_size": 13 * 32,
    "num_hidden_layers": 3,
}
TOKENS = torch.randint(0, VOCAB, (70,), generator=torch.Generator().manual_seed(3)).tolist()


# The others have every part of these at work.
NIGHTLY = (
    "tp 2",
    "pp 2",
    "pp 3",
    "tp 2 x pp 2",
    "ep 2",
    "ep 3",
    "ep 2 x pp 2",
    "tp 2 x ep 2 over gloo",
)


def _some_nightly(names: Iterable[str]) -> list[Any]:
    return [
        pytest.param(name, marks=pytest.mark.nightly) if name in NIGHTLY else name for name in names
    ]


def address(spec: ShardSpec, kind: str = "shared memory") -> GroupAddress:
    """All on one machine, or pretending that each has its own."""
    workers = range(spec.workers)
    nodes = ["here" if kind == "shared memory" else f"node {worker}" for worker in workers]
    return GroupAddress(
        name=group_name(),
        nodes=tuple(nodes),
        hosts=("127.0.0.1",) * spec.workers,
        store_port=free_port(),
        timeout_s=60,
    )


def run_steps(runner: Runner) -> list[Logits]:
    """A prefill; a chunk of it again beside another sequence; decode steps."""
    run = PagedRun(runner, blocks_a_row=5)
    steps = [run.step(Piece(row=0, first=0, tokens=TOKENS[:60]))]
    for first in (0, 23):
        chunk = Piece(row=1, first=first, tokens=TOKENS[first : first + 23])
        beside = Piece(row=2, first=first, tokens=TOKENS[-23:])
        steps.append(run.step(beside, chunk))
    for position in range(60, 64):
        steps.append(run.step(Piece(row=0, first=position, tokens=[TOKENS[position]])))
    return [piece.numpy() for step in steps for piece in step]


def load(
    folder: Path,
    dtype: str,
    place: Place | None,
    group: GroupAddress | None,
    rounding: str | None = None,
) -> Runner:
    links = open_links(place, group) if place is not None and group is not None else None
    return Runner(
        folder,
        dtype=dtype,
        device=torch.device("cpu"),
        context_limit=None,
        build=KernelBuild(threads=1, rounding=rounding),
        links=links,
    )


def sharded(
    rank: int, ranks: int, folder: Path, spec: ShardSpec, groups: dict[str, GroupAddress]
) -> dict[str, tuple[str, list[Logits], Any]]:
    told = {}
    for dtype, group in groups.items():
        runner = load(folder, dtype, Place.of(spec, rank), group)
        told[dtype] = runner.description, run_steps(runner), _loads(runner)
    return told


def _loads(runner: Runner) -> Any:
    """[layers of the model, experts]: of a pipeline stage only its own layers are not zero."""
    loads_LX = runner.expert_loads()
    if loads_LX is None:
        return None
    all_LX = numpy.zeros((runner.config.layers, loads_LX.shape[1]), dtype=numpy.int64)
    all_LX[runner.share.layers.start : runner.share.layers.stop] = loads_LX.numpy()
    return all_LX


def logits_of(
    folder: Path, spec: ShardSpec, kind: str = "shared memory"
) -> dict[str, list[Logits]]:
    """Those of a group of processes, by dtype. Only its sampler may have any."""
    groups = {dtype: address(spec, kind) for dtype in DTYPES}
    told = run_ranks(spec.workers, sharded, folder, spec, groups)
    found = {}
    for dtype, path in DTYPES.items():
        assert all(each[dtype][0].startswith(path) for each in told)
        having = [rank for rank, each in enumerate(told) if each[dtype][1]]
        assert having == [spec.workers - spec.tp * spec.ep]
        found[dtype] = told[having[0]][dtype][1]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("uneven") / "model", **SHAPE)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[Logits]]:
    return {dtype: run_steps(load(folder, dtype, None, None)) for dtype in DTYPES}


@pytest.mark.parametrize("name", _some_nightly(SPECS))
def test_logits_are_those_of_one_worker(
    folder: Path, alone: dict[str, list[Logits]], name: str
) -> None:
    """In C++ bit for bit. In torch, float32, only the order of sums differs: relative errors of
    about 1e-6, so 1e-5 of the largest logit; a head, column or token in the wrong place is off by
    more than 1e-1."""
    spread = logits_of(folder, SPECS[name], "gloo" if name.endswith("gloo") else "shared memory")
    for got, expected in zip(spread["bfloat16"], alone["bfloat16"], strict=True):
        assert numpy.array_equal(got, expected)
    for got, expected in zip(spread["float32"], alone["float32"], strict=True):
        assert numpy.abs(got - expected).max() <= 1e-5 * numpy.abs(expected).max()


EXPERT_SPECS = {
    "ep 2": ShardSpec(ep=2),
    "ep 3": ShardSpec(ep=3),
    "tp 2": ShardSpec(tp=2),
    "tp 2 x ep 2": ShardSpec(tp=2, ep=2),
    "ep 2 x pp 2": ShardSpec(ep=2, pp=2),
    "ep 2 over gloo": ShardSpec(ep=2),
    "tp 2 x ep 2 over gloo": ShardSpec(tp=2, ep=2),
}
# What a worker that was given too few rows, or a wrong expert's, would be far off from.
EXPERTS = {
    "num_hidden_layers": 2,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 96,
    "num_attention_heads": 8,
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    return make_tiny_model(root / "model", "Qwen3MoeForCausalLM", **EXPERTS)


@pytest.mark.parametrize("name", _some_nightly(EXPERT_SPECS))
def test_experts_spread_over_workers(mixture: Path, name: str) -> None:
    """float32 as above. In C++ the exchange moves float32 sums and exact bfloat16 rows, so only the
    order of sums differs, but a rounding of 2^-9 on the way may follow: within 2 % of the largest
    logit, of which a wrong expert is off by more than a fifth."""
    spec = EXPERT_SPECS[name]
    alone = {dtype: load(mixture, dtype, None, None) for dtype in DTYPES}
    expected = {dtype: run_steps(runner) for dtype, runner in alone.items()}
    kind = "gloo" if name.endswith("gloo") else "shared memory"
    groups = {dtype: address(spec, kind) for dtype in DTYPES}
    told = run_ranks(spec.workers, sharded, mixture, spec, groups)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.02)):
        (logits,) = [each[dtype][1] for each in told if each[dtype][1]]
        for got, wanted in zip(logits, expected[dtype], strict=True):
            assert numpy.abs(got - wanted).max() <= tolerance * numpy.abs(wanted).max()
        loads = sum(each[dtype][2] for each in told)
        assert loads.tolist() == alone[dtype].expert_loads().tolist()
        assert (loads > 0).sum() > loads.size // 2


# Folders of these formats, and a plain one that is rounded at load. In torch fp8 rounds what a
# worker has by scales of its own; in C++ it is bfloat16.
STORED = ("int8 by int8", "int8", "int4 in 64s", "int4 with minimums", "fp8 in blocks")
AT_LOAD = ("int8", "int4")


@pytest.mark.parametrize("name", ["some, tp 3", *_some_nightly(("tp 2", "tp 2 x pp 2"))])
def test_weights_of_every_format_over_workers(tmp_path: Path, folder: Path, name: str) -> None:
    """In C++ bit for bit: groups of inputs are cut at the same places for any number of workers.
    13 steps of the MLP over 12 chunks put borders inside of groups of 64."""
    some = name.startswith("some")
    stored = ("int8 by int8", "int4 in 64s") if some else STORED
    models: dict[str, tuple[Path, str | None]] = {
        form: (checkpoint(tmp_path / form, form, **SHAPE)[0], None) for form in stored
    }
    models |= {f"{form} at load": (folder, form) for form in (("int8",) if some else AT_LOAD)}
    spec = SPECS[name.removeprefix("some, ")]
    groups = {form: address(spec) for form in models}
    told = run_ranks(spec.workers, sharded_formats, models, spec, groups)
    for form, (path, rounding) in models.items():
        runner = load(path, "bfloat16", None, None, rounding)
        whole = set(runner.description.replace(",", "").split())
        parts = [set(each[form][0].replace(",", "").split()) for each in told]
        # A stage without the head, which int4 at load keeps in int8, has no int8 to tell of.
        assert all("C++" in one and (one == whole or spec.pp > 1) for one in parts), form
        assert set().union(*parts) == whole, form
        (logits,) = [each[form][1] for each in told if each[form][1]]
        for got, expected in zip(logits, run_steps(runner), strict=True):
            assert numpy.array_equal(got, expected), form


def sharded_formats(
    rank: int,
    ranks: int,
    models: dict[str, tuple[Path, str | None]],
    spec: ShardSpec,
    groups: dict[str, GroupAddress],
) -> dict[str, tuple[str, list[Logits]]]:
    told = {}
    for form, (path, rounding) in models.items():
        runner = load(path, "bfloat16", Place.of(spec, rank), groups[form], rounding)
        told[form] = runner.description, run_steps(runner)
    return told
