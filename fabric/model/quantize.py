"""`quantize_model`: a folder of plain weights -> one of fp8, int8 or int4 weights with scales.

A calibration text runs through the model once. Every matrix is rounded in the formats that the wish
allows, best first; the first whose outputs on the calibration inputs err by no more than that
format's tolerance is taken, so what is sensitive stays wider because of what was measured:

fp8     e4m3 weights by row, activations by token; else bfloat16
int8    int8 weights by row, int8 activations by token; else int8 that keeps them; else bfloat16
int4    groups of 32 with minimums by GPTQ, int8 activations by group; else int8 that keeps its
        activations; else bfloat16

The output is in the format of compressed-tensors, which vLLM reads too, but for int4. A tied head
becomes a matrix of its own; the embedding stays bfloat16.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fabric.core.errors import ModelError
from fabric.kernels.device import allocate_pool
from fabric.kernels.program import KvPool, Linear, StepBatch
from fabric.kernels.quantized import (
    QuantizedWeight,
    Scheme,
    WeightFormat,
    quantize_weight,
    quantized_linear_reference,
)
from fabric.kernels.quantized_program import SCHEMES
from fabric.kernels.torch_executor import TorchExecutor
from fabric.model.decoder import build_program, matrix_modules
from fabric.model.progress import Progress, silent
from fabric.model.quantized_checkpoint import write_checkpoint
from fabric.model.rounding import round_by_error
from fabric.model.weights import Weights

WINDOW = 512
PAGE = 16
ERROR_ROWS = 256  # inputs on which a matrix's error is measured
HEAD_EVERY = 8  # of the calibration tokens, one in this many reaches the head
_COPIED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A scheme, and the largest relative error of a matrix's outputs that it may make."""

    name: str
    scheme: Scheme
    tolerance: float


# fp8, int8: a first guess that the perplexity bears out. int4: errors of 0.02 to 0.05 in every
# matrix cost the demo model 22 % perplexity (fabric/DESIGN.md, Q4).
CANDIDATES: Mapping[str, tuple[Candidate, ...]] = {
    "fp8": (Candidate(name="fp8", scheme=SCHEMES["fp8"], tolerance=0.08),),
    "int8": (
        Candidate(name="int8 x int8", scheme=SCHEMES["int8_activations"], tolerance=0.015),
        Candidate(name="int8", scheme=SCHEMES["int8"], tolerance=0.03),
    ),
    "int4": (
        Candidate(name="int4", scheme=SCHEMES["int4"], tolerance=0.02),
        Candidate(name="int8", scheme=SCHEMES["int8"], tolerance=0.03),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """What became of one matrix (of one input: q, k and v are one). `tried`: each candidate's
    relative error, in order; `weight` None: it stays as it was."""

    modules: tuple[str, ...]
    name: str
    tried: tuple[float, ...]
    weight: QuantizedWeight | None


def quantize_model(
    source: Path,
    target: Path,
    wish: str,
    *,
    tokens: Sequence[int],
    progress: Progress = silent,
) -> list[Rounded]:
    """Read the model in `source`, calibrate on `tokens`, write `target` (a new folder).

    `wish` is a key of `CANDIDATES`. Raises `ModelError` if the model is quantised already or
    `target` exists, `ValueError` for a text shorter than a window.
    """
    weights = Weights(source)
    if weights.config.quantization is not None:
        raise ModelError(f"{source} is quantised already")
    if target.exists():
        raise ModelError(f"{target} exists already; name a new folder")
    if len(tokens) < WINDOW:
        raise ValueError(f"the calibration text has {len(tokens)} tokens; {WINDOW} is the least")
    program = build_program(weights.config, weights, torch.bfloat16, context_limit=WINDOW)
    modules = iter(matrix_modules(weights.config))
    matrices = sum(isinstance(op, Linear) for op in program.ops)
    rounded: list[Rounded] = []

    def observe(op: Linear, x_TK: Tensor) -> None:
        assert isinstance(op.weight_NK, Tensor)
        names = tuple(next(modules))
        rounded.append(_round(names, op.weight_NK.float(), x_TK.float(), CANDIDATES[wish]))
        progress("rounding the matrices", len(rounded), matrices)

    window = min(WINDOW, weights.config.context_limit // PAGE * PAGE)
    _run(TorchExecutor(program, observe=observe), tokens, window)
    target.mkdir(parents=True)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if "index.json" not in file.name and file.name != "manifest.json":
                shutil.copy(file, target / file.name)
    write_checkpoint(target, weights, [(r.modules, r.weight) for r in rounded if r.weight])
    return rounded


def _round(
    modules: tuple[str, ...],
    weight_NK: Tensor,
    x_TK: Tensor,
    candidates: tuple[Candidate, ...],
) -> Rounded:
    sample = x_TK[:: max(1, len(x_TK) // ERROR_ROWS)]
    exact = sample @ weight_NK.T
    tried = []
    for candidate in candidates:
        if candidate.scheme.format is WeightFormat.INT4:
            weight = round_by_error(weight_NK, x_TK, candidate.scheme)
        else:
            weight = quantize_weight(weight_NK, candidate.scheme)
        got = quantized_linear_reference(sample, weight)
        tried.append(float((got - exact).norm() / exact.norm()))
        if tried[-1] <= candidate.tolerance:
            return Rounded(modules=modules, name=candidate.name, tried=tuple(tried), weight=weight)
    return Rounded(modules=modules, name="bfloat16", tried=tuple(tried), weight=None)


def _run(executor: TorchExecutor, tokens: Sequence[int], window: int) -> None:
    """One step over all whole windows of the text, each a sequence of its own."""
    windows = len(tokens) // window
    used = windows * window
    blocks = window // PAGE
    layout = executor.kv_layout(PAGE)
    pool = allocate_pool(windows * blocks, layout.block_bytes(), torch.device("cpu"))
    executor.run(
        StepBatch(
            token_ids_T=torch.tensor(tokens[:used], dtype=torch.int32),
            query_starts_S1=torch.arange(0, used + 1, window, dtype=torch.int32),
            first_positions_S=torch.zeros(windows, dtype=torch.int32),
            table_rows_S=torch.arange(windows, dtype=torch.int32),
            block_tables_XB=torch.arange(windows * blocks, dtype=torch.int32).view(windows, -1),
            logit_rows_R=torch.arange(0, used, HEAD_EVERY, dtype=torch.int32),
        ),
        KvPool(layout=layout, blocks_XB=pool),
    )
