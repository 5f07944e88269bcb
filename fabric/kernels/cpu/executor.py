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
from fabric.kernels.program import (
    Attend,
    Buffer,
    Embed,
    KvLayout,
    KvPool,
    Linear,
    Program,
    StepBatch,
)

MAX_HEAD_DIM = 256
MAX_PAGE = 128
# Logits of more rows than this (prompt logprobs) get a tensor of their own, freed with the result.
RESIDENT_LOGIT_ROWS = 256
COLUMN_ALIGNMENT = 32


class CpuExecutor:
    """The C++ executor. `isa` forces "amx", "avx512_bf16" or "avx2"; None takes the best there is.

    Raises `BuildError` when the library cannot be built or the instruction set is not to be had
    here, `ValueError` for a program it cannot run (see `unsupported_reason`), `RuntimeError` when
    memory or threads for it are not to be had.
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
        reason = unsupported_reason(program)
        if reason is not None:
            raise ValueError(f"the C++ executor cannot run this program: {reason}")
        self._library = _typed(load_library(cache_folder, compiler=compiler, progress=progress))
        self._shape = _shape_record(program)
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
        self._logits_RV = torch.empty(0, self._padded_vocab)
        self._prepared: _Prepared | None = None
        self._isa, self._handle = self._create(isa, threads)
        weakref.finalize(self, self._library.fabric_cpu_destroy, self._handle)
        self._add_ops(program)

    @property
    def description(self) -> str:
        """Which code runs."""
        return f"C++ {self._isa} bfloat16, {self._threads} threads"

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

    def run(self, batch: StepBatch, pool: KvPool) -> Tensor:
        """Logits, float32 [R, V], rows contiguous; overwritten by the next call.

        Raises `ValueError` for token ids, positions, rows or blocks out of range, or when memory
        for a step of this size is not to be had.
        """
        step = self._prepared
        if step is None or step.batch is not batch or step.pool is not pool:
            step = self._prepare(batch, pool)
        problem = self._library.fabric_cpu_run(self._handle, step.reference)
        if problem is not None:
            raise ValueError(f"the step cannot run: {problem.decode()}")
        return step.logits_RV

    def _prepare(self, batch: StepBatch, pool: KvPool) -> _Prepared:
        """The call's record. A batch whose tensors are filled anew for each step keeps it: making
        one costs 0.1 ms after a step has thrown everything out of the caches."""
        rows = batch.logit_rows_R.shape[0]
        logits_RV = self._logits_for(rows)
        record = _StepRecord(
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
            tokens=batch.token_ids_T.shape[0],
            sequences=batch.first_positions_S.shape[0],
            logit_row_count=rows,
            table_height=batch.block_tables_XB.shape[0],
            table_width=batch.block_tables_XB.stride(0),
            page=pool.layout.page,
        )
        step = _Prepared(
            batch=batch,
            pool=pool,
            reference=ctypes.byref(record),
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
                    ctypes.byref(self._shape), name.encode(), threads, ctypes.byref(handle)
                )
            )
            if handle.value is not None:
                return name, handle.value
        raise BuildError(f"this machine cannot run the instruction set {isa or 'of any kernel'}")

    def _add_ops(self, program: Program) -> None:
        weights = {
            op.weight_NK.data_ptr(): index
            for index, op in enumerate(program.ops)
            if isinstance(op, Linear) and op.target == Buffer.LOGITS
        }
        for op in program.ops:
            if isinstance(op, Embed):
                tied = weights.get(op.table_VD.data_ptr(), -1)
                problem = self._library.fabric_cpu_add_embed(
                    self._handle, op.table_VD.data_ptr(), tied
                )
            elif isinstance(op, Linear):
                record = _linear_record(op)
                problem = self._library.fabric_cpu_add_linear(self._handle, ctypes.byref(record))
            else:
                problem = self._library.fabric_cpu_add_attend(
                    self._handle,
                    op.layer,
                    op.window or 0,
                    _pointer(op.q_norm_E),
                    _pointer(op.k_norm_E),
                )
            _require_done(problem)

    def _logits_for(self, rows: int) -> Tensor:
        if rows > RESIDENT_LOGIT_ROWS:
            return torch.empty(rows, self._padded_vocab)
        if rows > self._logits_RV.shape[0]:
            self._logits_RV = torch.empty(min(2 * rows, RESIDENT_LOGIT_ROWS), self._padded_vocab)
        return self._logits_RV


def _require_done(problem: bytes | None) -> None:
    if problem is not None:
        raise RuntimeError(f"the C++ executor cannot start: {problem.decode()}")


def unsupported_reason(program: Program) -> str | None:
    """Why the C++ executor cannot run `program`, or None if it can."""
    if program.heads % program.kv_heads != 0:
        return f"{program.heads} heads are not a multiple of {program.kv_heads} kv heads"
    if program.head_dim % 8 != 0 or program.head_dim > MAX_HEAD_DIM:
        return f"head_dim {program.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    for table in (program.rope_cos_PE2, program.rope_sin_PE2):
        if table.dtype != torch.float32 or not table.is_contiguous() or table.device.type != "cpu":
            return "the rope tables are not contiguous float32 on the CPU"
    for index, op in enumerate(program.ops):
        reason = _unsupported_op(program, op)
        if reason is not None:
            return f"op {index} ({type(op).__name__}): {reason}"
    return None


def _unsupported_op(program: Program, op: Embed | Linear | Attend) -> str | None:
    columns = {
        Buffer.HIDDEN: program.hidden,
        Buffer.QKV: (program.heads + 2 * program.kv_heads) * program.head_dim,
        Buffer.ATTENDED: program.heads * program.head_dim,
        Buffer.GATED: program.intermediate,
        Buffer.LOGITS: program.vocab,
    }
    expected: list[tuple[Tensor | None, tuple[int, ...]]]
    if isinstance(op, Embed):
        expected = [(op.table_VD, (program.vocab, program.hidden))]
    elif isinstance(op, Attend):
        expected = [(op.q_norm_E, (program.head_dim,)), (op.k_norm_E, (program.head_dim,))]
        if op.window is not None and op.window < 1:
            return "a window below 1"
    else:
        outputs = columns[op.target] * (2 if op.gated else 1)
        inputs = columns[op.source]
        expected = [
            (op.weight_NK, (outputs, inputs)),
            (op.bias_N, (outputs,)),
            (op.norm_K, (inputs,)),
        ]
        if op.source == Buffer.LOGITS or op.source == op.target:
            return "it may not read the logits, or the buffer that it writes"
        if op.residual != (op.target == Buffer.HIDDEN) or (op.residual and op.gated):
            return "HIDDEN, and nothing else, is changed by adding to it"
        if op.gated and op.target == Buffer.LOGITS:
            return "logits cannot be gated"
        if op.norm_K is not None and op.source != Buffer.HIDDEN:
            return "only HIDDEN is normed"
    for tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
            return f"a weight is {tensor.dtype} on {tensor.device}, not bfloat16 on the CPU"
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            return f"a weight is {tuple(tensor.shape)}, not contiguous {shape}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prepared:
    """A step's record for C++ (it stays alive through the reference), and where its logits go."""

    batch: StepBatch
    pool: KvPool
    reference: Any
    logits_RV: Tensor


class _ShapeRecord(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("intermediate", ctypes.c_int32),
        ("vocab", ctypes.c_int32),
        ("positions", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("rope_cos", ctypes.c_void_p),
        ("rope_sin", ctypes.c_void_p),
    )


class _LinearRecord(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("source", ctypes.c_int32),
        ("target", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("residual", ctypes.c_int32),
        ("gated", ctypes.c_int32),
    )


class _StepRecord(ctypes.Structure):
    _fields_ = (
        ("token_ids", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("first_positions", ctypes.c_void_p),
        ("table_rows", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("logit_rows", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("block_bytes", ctypes.c_int64),
        ("block_count", ctypes.c_int64),
        ("logits_stride", ctypes.c_int64),
        ("tokens", ctypes.c_int32),
        ("sequences", ctypes.c_int32),
        ("logit_row_count", ctypes.c_int32),
        ("table_height", ctypes.c_int32),
        ("table_width", ctypes.c_int32),
        ("page", ctypes.c_int32),
    )


def _shape_record(program: Program) -> _ShapeRecord:
    return _ShapeRecord(
        layers=program.layers,
        hidden=program.hidden,
        heads=program.heads,
        kv_heads=program.kv_heads,
        head_dim=program.head_dim,
        intermediate=program.intermediate,
        vocab=program.vocab,
        positions=program.rope_cos_PE2.shape[0],
        norm_eps=program.norm_eps,
        attention_scale=program.attention_scale,
        rope_cos=program.rope_cos_PE2.data_ptr(),
        rope_sin=program.rope_sin_PE2.data_ptr(),
    )


def _linear_record(op: Linear) -> _LinearRecord:
    return _LinearRecord(
        weight=op.weight_NK.data_ptr(),
        bias=_pointer(op.bias_N),
        norm=_pointer(op.norm_K),
        source=int(op.source),
        target=int(op.target),
        outputs=op.weight_NK.shape[0],
        inputs=op.weight_NK.shape[1],
        residual=int(op.residual),
        gated=int(op.gated),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.fabric_cpu_create.restype = ctypes.c_char_p
    library.fabric_cpu_create.argtypes = [pointer, ctypes.c_char_p, integer, pointer]
    library.fabric_cpu_destroy.restype = None
    library.fabric_cpu_destroy.argtypes = [pointer]
    library.fabric_cpu_add_embed.restype = ctypes.c_char_p
    library.fabric_cpu_add_embed.argtypes = [pointer, pointer, integer]
    library.fabric_cpu_add_linear.restype = ctypes.c_char_p
    library.fabric_cpu_add_linear.argtypes = [pointer, pointer]
    library.fabric_cpu_add_attend.restype = ctypes.c_char_p
    library.fabric_cpu_add_attend.argtypes = [pointer, integer, integer, pointer, pointer]
    library.fabric_cpu_weight_bytes.restype = ctypes.c_int64
    library.fabric_cpu_weight_bytes.argtypes = [pointer]
    library.fabric_cpu_poison.restype = None
    library.fabric_cpu_poison.argtypes = [pointer]
    library.fabric_cpu_run.restype = ctypes.c_char_p
    library.fabric_cpu_run.argtypes = [pointer, pointer]
    return library
