"""`CudaExecutor`: a program on a GPU. Prefill and mixed steps are launched op by op, decode steps
are replayed as CUDA graphs.

Not run on a GPU yet: its kernels are checked one by one and as a whole program in triton's
interpreter, and compiled for sm_90 by `make kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from fabric.kernels.cuda.decode_graphs import Capture, DecodeGraphs, Work, capture_cuda_graph
from fabric.kernels.cuda.experts import Experts
from fabric.kernels.cuda.forward import Forward
from fabric.kernels.cuda.quantized_product import loadable
from fabric.kernels.cuda.step_inputs import StepInputs, StepPacker
from fabric.kernels.launch import Launch
from fabric.kernels.launch_table import LaunchKey, LaunchTable
from fabric.kernels.program import (
    Attend,
    Buffer,
    Embed,
    Enter,
    KvLayout,
    KvPool,
    Leave,
    Linear,
    Mixture,
    Op,
    Program,
    StepBatch,
    tensors_of,
)
from fabric.kernels.quantized import QuantizedWeight


class CudaExecutor:
    """Implements `Executor`. Pages are plain, bfloat16 or fp8.

    `target`: whose launches to take (None: the device's). `capture`: how decode steps are made
    replayable. Sums are in cuBLAS's order, not in a `ChunkedSum`'s. A worker of a group or of a
    pipeline launches its steps op by op: what they exchange is not captured. Raises `ValueError`
    for a program or device that it cannot run.
    """

    def __init__(
        self,
        program: Program,
        device: torch.device,
        *,
        target: str | None = None,
        tuned: Mapping[LaunchKey, Launch] | None = None,
        capture: Capture = capture_cuda_graph,
    ) -> None:
        self._device = device
        self._target = target or target_of(device)
        table = LaunchTable(self._target, tuned)
        self._program, experts = _moved(program, device, table)
        mixtures = [op for op in self._program.ops if isinstance(op, Mixture)]
        self._loads_LX = (
            torch.zeros((program.layers, mixtures[0].runs[-1].stop), dtype=torch.int64).to(device)
            if mixtures
            else None
        )
        self._forward = Forward(self._program, table, experts, self._loads_LX)
        self._capture = capture
        staged = any(isinstance(op, Enter | Leave) for op in self._program.ops)
        self._alone = program.group is None and not staged
        self._graphs: DecodeGraphs | None = None
        if device.type == "cuda":
            # Descriptors that a kernel makes itself lie in memory that triton asks for.
            triton.set_allocator(_scratch_allocator(device))

    @property
    def description(self) -> str:
        """Which code runs."""
        weights = {op.weight_NK for op in self._program.ops if isinstance(op, Linear)}
        formats = sorted({str(w.format) for w in weights if isinstance(w, QuantizedWeight)})
        names = " and ".join(["bfloat16", *formats])
        how = "decode steps as CUDA graphs" if self._alone else "op by op"
        return f"Triton {names} for {self._target}, {how}"

    def kv_layout(self, page: int) -> KvLayout:
        """Plain pages of `page` tokens."""
        return KvLayout(
            dtype="float8_e4m3fn" if self._program.fp8_pages else "bfloat16",
            packing="plain",
            layers=self._program.layers,
            kv_heads=self._program.kv_heads,
            head_dim=self._program.head_dim,
            page=page,
        )

    def weight_bytes(self) -> int:
        """Bytes of all weights, shared ones (a tied embedding) once."""
        weights = {
            tensor.data_ptr(): tensor.nbytes
            for op in self._program.ops
            for tensor in tensors_of(op).values()
        }
        return sum(weights.values())

    @property
    def hidden_dtype(self) -> torch.dtype:
        """That of the weights."""
        return torch.bfloat16

    def expert_loads(self) -> Tensor | None:
        """As `Executor` says."""
        return None if self._loads_LX is None else self._loads_LX.cpu()

    @torch.inference_mode()
    def run(self, batch: StepBatch, pool: KvPool, entering_TD: Tensor | None = None) -> Tensor:
        """As `Executor` says, on the device."""
        replayed = self._replayed(batch, pool) if self._alone else None
        if replayed is not None:
            return replayed
        shape, packed = self._packer(pool).pack(batch)
        if self._device.type == "cuda":
            packed = packed.pin_memory()
        buffer = packed.to(self._device, non_blocking=True)
        return self._forward.run(StepInputs.of(buffer, shape), pool, entering_TD)

    def _replayed(self, batch: StepBatch, pool: KvPool) -> Tensor | None:
        graphs = self._graphs
        if graphs is None or graphs.pool is not pool:
            graphs = self._graphs = self._graphs_of(pool)
        return graphs.run(batch)

    def _graphs_of(self, pool: KvPool) -> DecodeGraphs:
        return DecodeGraphs(
            self._forward.run,
            self._packer(pool),
            pool,
            capture=self._captured,
            longest_min=self._forward.split_keys,
        )

    def _captured(self, work: Work) -> Work:
        """What runs before the first replay must not count rows of experts twice."""
        before_LX = None if self._loads_LX is None else self._loads_LX.clone()
        replay = self._capture(work)
        if self._loads_LX is not None and before_LX is not None:
            self._loads_LX.copy_(before_LX)
        return replay

    def _packer(self, pool: KvPool) -> StepPacker:
        return StepPacker(
            page=pool.layout.page,
            group=self._program.heads // self._program.kv_heads,
            tile_rows=self._forward.tile_rows,
        )


def target_of(device: torch.device) -> str:
    """Whose launches a GPU takes: those of the newest generation known that it can run. Raises
    `ValueError` for one that is too old."""
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    if properties.major >= 9:
        return "sm_90"
    if properties.major == 8:
        return "sm_80"
    raise ValueError(f"{properties.name} is older than compute capability 8.0")


def _moved(
    program: Program, device: torch.device, table: LaunchTable
) -> tuple[Program, dict[int, Experts]]:
    """The program on `device` and its mixtures' experts by layer, in one walk through its ops: they
    may be read from disk as one walks. Quantised weights as `loadable` has them. Raises
    `ValueError` for what it cannot run."""
    if program.heads % program.kv_heads != 0:
        raise ValueError(f"{program.heads} heads are not a multiple of {program.kv_heads} kv heads")
    if program.head_dim > 256 or program.head_dim % 8:
        raise ValueError(f"head_dim {program.head_dim} is not a multiple of 8 up to 256")
    if (
        program.fp8_pages
        and LaunchKey(operation="kv_write", form="fp8", bucket="any") not in table.entries()
    ):
        raise ValueError(f"there are no fp8 pages on {table.target}")
    moved: dict[int, Tensor] = {}
    experts: dict[int, Experts] = {}
    ops: list[Op] = []
    for index, op in enumerate(program.ops):
        if isinstance(op, Enter | Leave):
            ops.append(op)
            continue
        weights = {name: getattr(op, name) for name in _FIELDS[type(op)]}
        weights = {name: weight for name, weight in weights.items() if weight is not None}
        for name, weight in weights.items():
            if isinstance(weight, QuantizedWeight):
                head = isinstance(op, Linear) and op.target is Buffer.LOGITS
                weights[name] = loadable(weight, table, head=head).to(device)
                continue
            _require_plain(f"{name} of op {index}", weight)
            # A tied embedding is moved once.
            weights[name] = moved.setdefault(weight.data_ptr(), weight.to(device))
        changes: dict[str, Any] = weights
        if isinstance(op, Attend) and op.kv_scales_KG is not None:
            changes["kv_scales_KG"] = op.kv_scales_KG.to(device).contiguous()
        if isinstance(op, Mixture):
            mine = experts[op.layer] = Experts.of(op, device)
            changes |= {"gate_up_ND": mine.gate_up.unbind(), "down_DN": mine.down.unbind()}
        ops.append(replace(op, **changes))
    on_device = replace(
        program,
        ops=tuple(ops),
        rope_cos_PE2=program.rope_cos_PE2.to(device),
        rope_sin_PE2=program.rope_sin_PE2.to(device),
    )
    return on_device, experts


def _require_plain(name: str, weight: object) -> None:
    if not isinstance(weight, Tensor):
        raise ValueError(f"{name} is {type(weight).__name__}, no plain tensor")
    if weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        raise ValueError(f"{name} is not contiguous bfloat16")


_FIELDS: Mapping[type, tuple[str, ...]] = {
    Embed: ("table_VD",),
    Linear: ("weight_NK", "bias_N", "norm_K"),
    Attend: ("q_norm_E", "k_norm_E"),
    Mixture: ("norm_D", "router_XD"),
}


def _scratch_allocator(device: torch.device) -> Callable[[int, int, int | None], Tensor]:
    def allocate(size: int, alignment: int, _stream: int | None) -> Tensor:
        assert alignment <= 512, "torch aligns to 512 bytes"
        return torch.empty(size, dtype=torch.int8, device=device)

    return allocate
