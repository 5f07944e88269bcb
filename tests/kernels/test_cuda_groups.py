"""The CUDA executor's experts, groups and stages, in the interpreter, against torch in float32.

Groups are real processes over gloo; between GPUs the same calls go through NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kit.paged import PagedRun, Piece
from kit.ranks import free_port, group_name, run_ranks
from kit.tiny_models import make_tiny_model
from torch import Tensor

from fabric.core.shard import Place, ShardSpec
from fabric.kernels.collective import Collective
from fabric.kernels.program import Executor, KvLayout, KvPool, Program, StepBatch
from fabric.kernels.torch_executor import TorchExecutor
from fabric.model.decoder import Member, build_program
from fabric.model.weights import Weights

SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_experts": 5,
    "num_experts_per_tok": 3,
}
TOKENS = torch.randint(0, 160, (20,), generator=torch.Generator().manual_seed(3)).tolist()
SPECS = {
    "tp 2": ShardSpec(tp=2),
    "ep 2": ShardSpec(ep=2),
    "pp 2": ShardSpec(pp=2),
}


def program_of(
    folder: Path, dtype: torch.dtype, place: Place | None = None, group: Collective | None = None
) -> Program:
    weights = Weights(folder)
    return build_program(
        weights.config,
        weights,
        dtype,
        context_limit=64,
        member=place and Member(place=place, group=group),
    )


def steps(executor: Any) -> list[Tensor]:
    """A prefill beside another sequence, a chunk, and decode steps of both."""
    run = PagedRun(executor, blocks_a_row=2)
    found = run.step(
        Piece(row=0, first=0, tokens=TOKENS[:13]), Piece(row=1, first=0, tokens=TOKENS[:3])
    )
    found += run.step(Piece(row=1, first=3, tokens=TOKENS[3:8]))
    for at in (0, 1):
        both = (Piece(row=row, first=first + at, tokens=[at]) for row, first in ((0, 13), (1, 8)))
        found += run.step(*both)
    return found


def worker(
    rank: int, ranks: int, folder: Path, spec: ShardSpec, port: int, name: str
) -> tuple[list[Any], Any, str]:
    os.environ["TRITON_INTERPRET"] = "1"
    from kit.interpreter import mend_interpreter

    from fabric.kernels.cuda.executor import CudaExecutor
    from fabric.kernels.process_group import ProcessGroupCollective

    mend_interpreter()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=rank == 0)
    group = ProcessGroupCollective.gloo(store, name, rank, ranks, host="127.0.0.1", timeout_s=60)
    place = Place.of(spec, rank)
    program = program_of(folder, torch.bfloat16, place, group if spec.pp == 1 else None)
    executor = CudaExecutor(program, torch.device("cpu"), target="sm_90", capture=lambda work: work)
    runs = executor if spec.pp == 1 else Stage(executor, group, place)
    logits = [each.numpy() for each in steps(runs)]
    loads = executor.expert_loads()
    return logits, None if loads is None else loads.numpy(), executor.description


class Stage:
    """Hands HIDDEN from one executor to the next rank's, as `worker.Runner` does."""

    def __init__(self, executor: Executor, group: Collective, place: Place) -> None:
        self._executor = executor
        self._group = group
        self._place = place

    def kv_layout(self, page: int) -> KvLayout:
        return self._executor.kv_layout(page)

    def run(self, batch: StepBatch, pool: KvPool) -> Tensor:
        entering = None
        if not self._place.is_first_stage:
            shape = (len(batch.token_ids_T), SHAPE["hidden_size"])
            entering = torch.empty(shape, dtype=self._executor.hidden_dtype)
            self._group.receive(entering, self._place.pp_rank - 1)
        result = self._executor.run(batch, pool, entering)
        if self._place.is_last_stage:
            return result
        self._group.send(result, self._place.pp_rank + 1)
        return torch.zeros(len(batch.logit_rows_R), 1)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    return make_tiny_model(root / "model", "Qwen3MoeForCausalLM", **SHAPE)


@pytest.fixture(scope="module")
def allowed(mixture: Path) -> tuple[list[Tensor], float, Tensor]:
    """Logits in float32, what bfloat16 may be off by, and the rows that experts get."""
    exact_executor = TorchExecutor(program_of(mixture, torch.float32))
    exact = steps(exact_executor)
    rounded = steps(TorchExecutor(program_of(mixture, torch.bfloat16)))
    loads = exact_executor.expert_loads()
    assert loads is not None
    return exact, 2 * _distance(rounded, exact), loads


def _distance(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, exact, strict=True))


def test_experts_on_one_worker(mixture: Path, allowed: tuple[list[Tensor], float, Tensor]) -> None:
    """Twice the distance of torch in bfloat16 from torch in float32: both round activations at the
    same places, but another order of sums may send a token to another expert."""
    from fabric.kernels.cuda.executor import CudaExecutor

    exact, most, loads = allowed
    program = program_of(mixture, torch.bfloat16)
    executor = CudaExecutor(
        program, torch.device("cpu"), target="sm_90", capture=lambda work: (work(), work)[1]
    )
    got = steps(executor)
    assert _distance(got, exact) <= most
    found = executor.expert_loads()
    assert found is not None
    # The padding of captured steps and the run before a capture don't count.
    assert found.sum() == loads.sum()
    assert (found - loads).abs().sum() <= 0.1 * loads.sum()
    empty = replace(program, ops=tuple(_without_experts(op) for op in program.ops))
    with pytest.raises(ValueError, match="without experts"):
        CudaExecutor(empty, torch.device("cpu"), target="sm_90")


def _without_experts(op: Any) -> Any:
    return replace(op, gate_up_ND=(), down_DN=()) if hasattr(op, "gate_up_ND") else op


@pytest.mark.nightly
@pytest.mark.parametrize("name", SPECS)
def test_workers_of_a_group_and_of_a_pipeline(
    mixture: Path, allowed: tuple[list[Tensor], float, Tensor], name: str
) -> None:
    exact, most, loads = allowed
    spec = SPECS[name]
    told = run_ranks(spec.workers, worker, mixture, spec, free_port(), group_name())
    assert all("op by op" in description for _, _, description in told)
    logits = map(torch.from_numpy, told[-1 if name == "pp 2" else 0][0])
    assert _distance(logits, exact) <= most
    found = [torch.from_numpy(each) for _, each, _ in told]
    total = torch.cat(found) if name == "pp 2" else torch.stack(found).sum(dim=0)
    assert total.sum() == loads.sum()
