"""A decoder is a short program of fused ops. `fabric.model.decoder` writes it; an executor runs it.

One model definition reaches every device this way: the ops are frozen records that name their
weights, the torch executor interprets them one by one (the reference, and the fallback), the CPU
executor hands the whole program to C++ once and then makes one call a step, and a CUDA executor
launches one kernel an op. What differs between architectures is in the records, not in executors.

A program may be one worker's share of a decoder: some of the layers (then it begins with `Enter`
or ends with `Leave`), or of every layer some heads, columns, rows of the vocabulary and experts. A
group of workers runs the latter together; ops whose result is spread over the group say so.

Shape legend: T tokens in the step, S sequences in the step, R rows whose logits are wanted,
D hidden, V vocab, N out, K in, H query heads, G kv heads, E head_dim, P positions, B blocks of a
sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from fabric.kernels.collective import Collective
from fabric.kernels.quantized import QuantizedWeight, Weight
from fabric.kernels.summation import ChunkedSum


class Buffer(IntEnum):
    """The activations of a step. Width in columns on the right."""

    HIDDEN = 0  # D: the residual stream; float32 in C++
    QKV = 1  # (H + 2G) * E: queries, keys, values of one layer, in that order
    ATTENDED = 2  # H * E
    GATED = 3  # intermediate
    LOGITS = 4  # V, float32, R rows instead of T


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embed:
    """HIDDEN[t] = table_VD[token_ids[t]]. In a group the rows are spread by vocabulary run.

    `tied`: the program's last op, the head, has this same tensor as its weight.
    """

    table_VD: Tensor
    tied: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Enter:
    """HIDDEN = what the pipeline stage before came to."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leave:
    """HIDDEN is this stage's result, for the next one; the last op."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    """target = source' @ weight_NK^T + bias_N; source' is RMS-normed by norm_K first if given.

    `residual`: target += instead of target =. `gated`: the weight's first N/2 rows are the gate,
    the rest are up; target gets silu(gate) * up, N/2 columns. `target` LOGITS reads only the
    batch's logit rows. RMSNorm (Zhang & Sennrich 2019) is computed in fp32, rounded to the
    model's dtype, then scaled, as transformers does. A quantised weight says itself what becomes of
    the activations; its sums know no chunks.

    `chunked`: the order in which the products are added; in a group, the inputs are spread over the
    workers, each has the whole bias, and each gets the whole sum. Logits are spread by vocabulary
    run; rank 0 gets them all.
    """

    source: Buffer
    target: Buffer
    weight_NK: Weight
    bias_N: Tensor | None = None
    norm_K: Tensor | None = None
    residual: bool = False
    gated: bool = False
    chunked: ChunkedSum | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attend:
    """QKV -> ATTENDED for one layer.

    Optional per-head RMSNorm of q and k, rotary embedding of q and k, write k and v into the
    layer's pages, causal attention of each query over its sequence's pages.

    `window`: a query sees only the last `window` positions, itself included (None: all).
    `kv_scales_KG`: float32 [2, G], of a program with `fp8_pages`: pages hold key / scale and value
    / scale of each head.
    """

    layer: int
    q_norm_E: Tensor | None = None
    k_norm_E: Tensor | None = None
    window: int | None = None
    kv_scales_KG: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mixture:
    """HIDDEN += the weighted sum of the likeliest experts' outputs, X experts in all.

    With n = the RMS-normed row: probabilities are the softmax of n @ router_XD^T in float32; the
    `top_k` likeliest experts (the lower number first among equals) get them as weights, scaled to
    sum 1 if `renormalise`; an expert is (silu(n @ gate) * (n @ up)) @ down. Mixtral (Jiang et al.
    2024) and Qwen3-MoE.

    `gate_up_ND` and `down_DN` hold this worker's experts, N columns of them: `runs[ep_rank]` of
    all. In a group of tp x ep workers (rank = ep_rank * tp + tp_rank) those of one ep_rank share
    the columns out. `layer` is for the load counters.
    """

    layer: int
    norm_D: Tensor
    router_XD: Tensor
    gate_up_ND: tuple[Tensor, ...]
    down_DN: tuple[Tensor, ...]
    top_k: int
    renormalise: bool
    runs: tuple[range, ...]


Op = Embed | Enter | Linear | Attend | Mixture | Leave


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """The ops of one step in order, and the constants they share.

    `rope_cos_PE2` and `rope_sin_PE2` are float32 [positions, head_dim / 2], half-split pairing
    (element i rotates with i + E/2); every rope scaling is folded into them, yarn's attention
    factor included. Weights that are plain tensors are all of one dtype (bfloat16 or float32),
    contiguous.

    `heads`, `kv_heads`, `intermediate` and `layers` are this worker's; `vocab` is the model's.
    `group`: the workers that run it together, and `vocab_runs` the rows of the vocabulary that each
    of them holds (None and none: it is alone). `fp8_pages`: keys and values are kept as e4m3, each
    `Attend` says by what scales. `ops` may be loaded while one walks through them:
    each walk reads the weights again.
    """

    ops: Sequence[Op]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float
    attention_scale: float
    rope_cos_PE2: Tensor
    rope_sin_PE2: Tensor
    vocab_runs: tuple[range, ...] = ()
    group: Collective | None = None
    fp8_pages: bool = False

    def dtype(self) -> torch.dtype:
        """That of the weights: of the first one."""
        for op in self.ops:
            for tensor in tensors_of(op).values():
                return tensor.dtype
        raise ValueError("a program without weights")


def tensors_of(op: Op) -> dict[str, Tensor]:
    """The op's weights by the names of their fields; those of experts are numbered, of a quantised
    one they are its values, scales and minimums."""
    found: dict[str, Tensor] = {}
    for field in fields(op):
        value = getattr(op, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif isinstance(value, QuantizedWeight):
            found[f"{field.name}.values"] = value.values
            found[f"{field.name}.scales"] = value.scales_AC
            if value.minimums_AC is not None:
                found[f"{field.name}.minimums"] = value.minimums_AC
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            found |= {f"{field.name}.{index}": each for index, each in enumerate(value)}
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBatch:
    """One step's input, ragged: sequence s owns tokens [query_starts_S1[s], query_starts_S1[s+1]).

    Its tokens sit at positions first_positions_S[s], +1, ... ; its block table is the row
    table_rows_S[s] of block_tables_XB (a persistent table, X >= S). All int32, on the CPU.
    """

    token_ids_T: Tensor
    query_starts_S1: Tensor
    first_positions_S: Tensor
    table_rows_S: Tensor
    block_tables_XB: Tensor
    logit_rows_R: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """The bytes of one block, in this order: layer, then K before V, then kv head, then `packing`.

    `packing`: "plain" [page, head_dim] for K and V; "vnni": K [head_dim/2][page][2],
    V [page/2][head_dim][2].
    """

    dtype: str
    packing: str
    layers: int
    kv_heads: int
    head_dim: int
    page: int

    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        element = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}[self.dtype]
        return 2 * self.layers * self.kv_heads * self.head_dim * self.page * element


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KvPool:
    """`blocks_XB` is uint8 [num_blocks, block_bytes]: one block is one contiguous run, so that a
    swap, a copy-on-write or a hand-over is one memcpy."""

    layout: KvLayout
    blocks_XB: Tensor


class Executor(Protocol):
    """Runs a program. Implementations: `TorchExecutor` (any device), `CpuExecutor` (C++) and
    `CudaExecutor` (Triton)."""

    @property
    def description(self) -> str:
        """For the log: which code runs, e.g. "C++ AMX bf16, 2 threads"."""
        ...

    def kv_layout(self, page: int) -> KvLayout:
        """The layout this executor wants its pool in."""
        ...

    def weight_bytes(self) -> int:
        """Resident bytes of weights, packed copies included."""
        ...

    @property
    def hidden_dtype(self) -> torch.dtype:
        """In which a stage hands HIDDEN on."""
        ...

    def run(self, batch: StepBatch, pool: KvPool, entering_TD: Tensor | None = None) -> Tensor:
        """Logits, float32 [R, V], or HIDDEN [T, D] of a program that ends with `Leave`.

        `entering_TD`: for a program that begins with `Enter`. In a group every worker runs the same
        batch at the same time; the logits are whole on rank 0, of the others' only the shape is.
        The buffer may be reused by the next call.
        """
        ...

    def expert_loads(self) -> Tensor | None:
        """int64 [layers, X]: how many rows each expert got since the start; only this worker's
        experts, and in a group only on the first worker that has them. None without experts."""
        ...
