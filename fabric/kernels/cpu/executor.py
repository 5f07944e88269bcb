"""Runs a bfloat16 program in C++: the ops are handed over once, then each step is one call.

The weights are packed into the order that the instruction set reads (and are then owned by C++; the
originals may be dropped), the whole op list runs inside one parallel region of a small thread pool,
and ctypes releases the GIL meanwhile. All instruction sets read the same packing, so pools can be
exchanged between them; their results differ in rounding, which is why one process uses one.

Batch invariance: per instruction set, a token's row of logits is bit for bit the same alone, in any
batch, in any chunk of its prompt, and whether computed as prefill or as decode.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fabric.kernels.cpu.build import BuildError, Progress, load_library, supported_instruction_sets
from fabric.kernels.cpu.executor_group import ChunkRecords, ExecutorGroup
from fabric.kernels.cpu.quantized_record import QuantizedCall
from fabric.kernels.cpu.records import (
    LinearRecord,
    MixtureCall,
    StepRecord,
    linear_record,
    pointer,
    shape_record,
)
from fabric.kernels.cpu.support import unsupported_op, unsupported_shape
from fabric.kernels.program import (
    Attend,
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
)
from fabric.kernels.quantized import QuantizedWeight

MAX_PAGE = 128
# Logits of more rows than this (prompt logprobs) get a tensor of their own, freed with the result.
RESIDENT_LOGIT_ROWS = 256
COLUMN_ALIGNMENT = 32


class UnsupportedProgram(ValueError):
    """The C++ executor cannot run this program; the message says why."""


class CpuExecutor:
    """The C++ executor. `isa` forces "amx", "avx512_bf16" or "avx2"; None takes the best there is.

    Raises `BuildError` when the library cannot be built or the instruction set is not to be had
    here, `UnsupportedProgram`, `RuntimeError` when memory or threads for it are not to be had.
    """

    def __init__(
        self,
        program: Program,
        *,
        threads: int,
        isa: str | None = None,
        cache_folder: Path | None = None,
        compiler: str = "g++",
        progress: Progress | None = None,
    ) -> None:
        _require_supported(unsupported_shape(program))
        self._library = _typed(load_library(cache_folder, compiler=compiler, progress=progress))
        self._group = ExecutorGroup(self._library, program)
        self._shape = shape_record(program, self._group)
        self._rope = (program.rope_cos_PE2, program.rope_sin_PE2)  # read in place by C++
        self._vocab = program.vocab
        self._padded_vocab = -(-program.vocab // COLUMN_ALIGNMENT) * COLUMN_ALIGNMENT
        self._layout = KvLayout(
            dtype="bfloat16",
            packing="vnni",
            layers=program.layers,
            kv_heads=program.kv_heads,
            head_dim=program.head_dim,
            page=16,
        )
        self._threads = threads
        self._formats = {"bfloat16": None}  # then those of quantised weights, in order
        self._logits_RV = torch.empty(0, self._padded_vocab)
        self._prepared: _Prepared | None = None
        self._hidden = program.hidden
        self._leaves = False
        self._loads_LX: Tensor | None = None  # counted in C++
        self._isa, self._handle = self._create(isa, threads)
        weakref.finalize(self, self._library.fabric_cpu_destroy, self._handle)
        self._add_ops(program)

    @property
    def description(self) -> str:
        """Which code runs."""
        return f"C++ {self._isa} {' and '.join(self._formats)}, {self._threads} threads"

    def kv_layout(self, page: int) -> KvLayout:
        """VNNI pages of `page` tokens, a multiple of 16 up to 128. Raises `ValueError` else."""
        if page % 16 != 0 or not 16 <= page <= MAX_PAGE:
            raise ValueError(
                f"the C++ executor needs a page of 16 to {MAX_PAGE} in 16s, not {page}"
            )
        fields = {name: getattr(self._layout, name) for name in self._layout.__slots__}
        return KvLayout(**{**fields, "page": page})

    def weight_bytes(self) -> int:
        """Resident bytes of packed weights."""
        return int(self._library.fabric_cpu_weight_bytes(self._handle))

    @property
    def hidden_dtype(self) -> torch.dtype:
        """The residual stream is float32 here."""
        return torch.float32

    def expert_loads(self) -> Tensor | None:
        """As `Executor` says."""
        return None if self._loads_LX is None else self._loads_LX.clone()

    def run(self, batch: StepBatch, pool: KvPool, entering_TD: Tensor | None = None) -> Tensor:
        """Logits, float32 [R, V], rows contiguous, or HIDDEN; overwritten by the next call.

        Raises `ValueError` for token ids, positions, rows or blocks out of range, or when memory
        for a step of this size is not to be had; `CollectiveError` when the group is lost.
        """
        self._group.require_open()
        step = self._prepared
        if step is None or step.batch is not batch or step.pool is not pool:
            step = self._prepare(batch, pool)
        step.record.entering = pointer(entering_TD)
        problem = self._library.fabric_cpu_run(self._handle, step.reference)
        if problem is not None:
            if self._library.fabric_cpu_lost_group(self._handle):
                self._group.raise_lost(problem.decode())
            raise ValueError(f"the step cannot run: {problem.decode()}")
        return step.logits_RV if step.leaving_TD is None else step.leaving_TD

    def _prepare(self, batch: StepBatch, pool: KvPool) -> _Prepared:
        """The call's record. A batch whose tensors are filled anew for each step keeps it: making
        one costs 0.1 ms after a step has thrown everything out of the caches."""
        rows = batch.logit_rows_R.shape[0]
        tokens = batch.token_ids_T.shape[0]
        logits_RV = self._logits_for(0 if self._leaves else rows)
        leaving_TD = torch.empty(tokens, self._hidden) if self._leaves else None
        record = StepRecord(
            token_ids=batch.token_ids_T.data_ptr(),
            query_starts=batch.query_starts_S1.data_ptr(),
            first_positions=batch.first_positions_S.data_ptr(),
            table_rows=batch.table_rows_S.data_ptr(),
            block_tables=batch.block_tables_XB.data_ptr(),
            logit_rows=batch.logit_rows_R.data_ptr(),
            blocks=pool.blocks_XB.data_ptr(),
            logits=logits_RV.data_ptr(),
            block_bytes=pool.blocks_XB.stride(0),
            block_count=pool.blocks_XB.shape[0],
            logits_stride=self._padded_vocab,
            leaving=pointer(leaving_TD),
            tokens=tokens,
            sequences=batch.first_positions_S.shape[0],
            logit_row_count=rows,
            table_height=batch.block_tables_XB.shape[0],
            table_width=batch.block_tables_XB.stride(0),
            page=pool.layout.page,
        )
        step = _Prepared(
            batch=batch,
            pool=pool,
            record=record,
            reference=ctypes.byref(record),
            leaving_TD=leaving_TD,
            logits_RV=logits_RV[:rows, : self._vocab],
        )
        self._prepared = step if rows <= RESIDENT_LOGIT_ROWS else None
        return step

    def poison(self) -> None:
        """For tests: every step from now on begins with its activations full of NaN."""
        self._library.fabric_cpu_poison(self._handle)

    def _create(self, isa: str | None, threads: int) -> tuple[str, int]:
        names = [each.name for each in supported_instruction_sets() if isa in (None, each.name)]
        for name in names:
            handle = ctypes.c_void_p()
            _require_done(
                self._library.fabric_cpu_create(
                    ctypes.byref(self._shape),
                    name.encode(),
                    threads,
                    self._group.handle,
                    ctypes.byref(handle),
                )
            )
            if handle.value is not None:
                return name, handle.value
        raise BuildError(f"this machine cannot run the instruction set {isa or 'of any kernel'}")

    def _add_ops(self, program: Program) -> None:
        """One walk: an op's weights are packed before the next one's are loaded."""
        last = len(program.ops) - 1
        for index, op in enumerate(program.ops):
            reason = unsupported_op(program, op)
            if reason is not None:
                _require_supported(f"op {index} ({type(op).__name__}): {reason}")
            _require_done(self._add(op, program, last))

    def _add(self, op: Op, program: Program, last: int) -> bytes | None:
        library, handle = self._library, self._handle
        problem: bytes | None
        match op:
            case Embed():
                tied = last if op.tied else -1
                problem = library.fabric_cpu_add_embed(handle, op.table_VD.data_ptr(), tied)
            case Linear():
                chunks = ChunkRecords(op.chunked, program.group)
                problem = self._add_linear(op, linear_record(op, chunks))
            case Attend():
                problem = library.fabric_cpu_add_attend(
                    handle,
                    op.layer,
                    op.window or 0,
                    pointer(op.q_norm_E),
                    pointer(op.k_norm_E),
                )
            case Enter() | Leave():
                self._leaves = isinstance(op, Leave)
                problem = library.fabric_cpu_add_hand_over(handle, int(not self._leaves))
            case Mixture():
                call = MixtureCall(op, self._loads_of(op, program))
                problem = library.fabric_cpu_add_mixture(handle, ctypes.byref(call.record))
        return problem

    def _add_linear(self, op: Linear, record: LinearRecord) -> bytes | None:
        quantized, weight = None, op.weight_NK
        if isinstance(weight, QuantizedWeight):
            call = QuantizedCall(weight, op.chunked)
            quantized = ctypes.byref(call.record)
            self._formats[str(weight.format)] = None
        add = self._library.fabric_cpu_add_linear
        problem: bytes | None = add(self._handle, ctypes.byref(record), quantized)
        return problem

    def _loads_of(self, op: Mixture, program: Program) -> Tensor | None:
        """Where this op counts: of the workers that share an expert's columns only the first."""
        if self._loads_LX is None:
            self._loads_LX = torch.zeros((program.layers, op.runs[-1].stop), dtype=torch.int64)
        group = program.group
        if group is not None and group.rank % (group.size // len(op.runs)):
            return None
        return self._loads_LX[op.layer]

    def _logits_for(self, rows: int) -> Tensor:
        if rows > RESIDENT_LOGIT_ROWS:
            return torch.empty(rows, self._padded_vocab)
        if rows > self._logits_RV.shape[0]:
            self._logits_RV = torch.empty(min(2 * rows, RESIDENT_LOGIT_ROWS), self._padded_vocab)
        return self._logits_RV


def _require_done(problem: bytes | None) -> None:
    if problem is not None:
        raise RuntimeError(f"the C++ executor cannot start: {problem.decode()}")


def _require_supported(reason: str | None) -> None:
    if reason is not None:
        raise UnsupportedProgram(f"the C++ executor cannot run this program: {reason}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    """A step's record for C++ (it stays alive through the reference), and where its logits go."""

    batch: StepBatch
    pool: KvPool
    record: StepRecord
    reference: Any
    logits_RV: Tensor
    leaving_TD: Tensor | None


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.fabric_cpu_create.restype = ctypes.c_char_p
    library.fabric_cpu_create.argtypes = [pointer, ctypes.c_char_p, integer, pointer, pointer]
    library.fabric_cpu_destroy.restype = None
    library.fabric_cpu_destroy.argtypes = [pointer]
    library.fabric_cpu_add_embed.restype = ctypes.c_char_p
    library.fabric_cpu_add_embed.argtypes = [pointer, pointer, integer]
    library.fabric_cpu_add_linear.restype = ctypes.c_char_p
    library.fabric_cpu_add_linear.argtypes = [pointer, pointer, pointer]
    library.fabric_cpu_add_attend.restype = ctypes.c_char_p
    library.fabric_cpu_add_attend.argtypes = [pointer, integer, integer, pointer, pointer]
    library.fabric_cpu_add_hand_over.restype = ctypes.c_char_p
    library.fabric_cpu_add_hand_over.argtypes = [pointer, integer]
    library.fabric_cpu_add_mixture.restype = ctypes.c_char_p
    library.fabric_cpu_add_mixture.argtypes = [pointer, pointer]
    library.fabric_cpu_lost_group.restype = integer
    library.fabric_cpu_lost_group.argtypes = [pointer]
    library.fabric_cpu_weight_bytes.restype = ctypes.c_int64
    library.fabric_cpu_weight_bytes.argtypes = [pointer]
    library.fabric_cpu_poison.restype = None
    library.fabric_cpu_poison.argtypes = [pointer]
    library.fabric_cpu_run.restype = ctypes.c_char_p
    library.fabric_cpu_run.argtypes = [pointer, pointer]
    return library
