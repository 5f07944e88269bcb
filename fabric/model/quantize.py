"""`quantize_model`: a folder of plain weights -> one of fp8, int8 or int4 weights with scales.

A calibration text runs through the model once. Every matrix is rounded to the first of the formats
that the wish allows, then what that does to the model's predictions is measured, matrix by matrix;
those that do most for their size stay wider, until all together do no more than the wish's budget.
So what is sensitive stays wider because of what was measured:

fp8     e4m3 weights by row by GPTQ, activations by token; else bfloat16
int8    int8 weights by row, int8 activations by token; else int8 that keeps them; else bfloat16
int4    groups of 32 with minimums by GPTQ, int8 activations by group; else int8 that keeps its
        activations; else bfloat16

The output is in the format of compressed-tensors, which vLLM reads too, but for int4. A tied head
becomes a matrix of its own; the embedding stays bfloat16. The model runs in float32 meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fabric.core.errors import ModelError
from fabric.kernels.program import Linear
from fabric.kernels.quantized import (
    QuantizedWeight,
    Scheme,
    quantize_weight,
)
from fabric.kernels.quantized_linear import quantized_linear_reference
from fabric.kernels.quantized_program import SCHEMES
from fabric.kernels.torch_executor import TorchExecutor
from fabric.model.decoder import build_program, matrix_modules
from fabric.model.progress import Progress, silent
from fabric.model.quantized_checkpoint import write_checkpoint
from fabric.model.rounding import round_by_error
from fabric.model.sensitivity import PAGE, TEXT_TOKENS, divergences, read_windows, widen
from fabric.model.weights import Weights

WINDOW = 512
ERROR_ROWS = 256  # inputs on which a matrix's error is measured
HEAD_EVERY = 8  # of the calibration tokens, one in this many reaches the head
_COPIED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A scheme. `cost`: of a number, in bytes read at its speed; bfloat16 costs 2."""

    name: str
    scheme: Scheme
    cost: float
    by_error: bool = False  # rounded by GPTQ, else to the nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """`candidates`: best first. `budget`: how far, in nats a token, the predictions may diverge:
    about a hundredth of what the gate allows in percent of perplexity, with room for chance."""

    candidates: tuple[Candidate, ...]
    budget: float


_INT8 = Candidate(name="int8", scheme=SCHEMES["int8"], cost=1.2)
WISHES: Mapping[str, Wish] = {
    "fp8": Wish(
        candidates=(Candidate(name="fp8", scheme=SCHEMES["fp8"], cost=1, by_error=True),),
        budget=0.007,
    ),
    "int8": Wish(
        candidates=(
            Candidate(name="int8 x int8", scheme=SCHEMES["int8_activations"], cost=1),
            _INT8,
        ),
        budget=0.007,
    ),
    "int4": Wish(
        candidates=(
            Candidate(name="int4", scheme=SCHEMES["int4"], cost=0.625, by_error=True),
            _INT8,
        ),
        budget=0.007,
    ),
}
BFLOAT16_COST = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """What became of one matrix (of one input: q, k and v are one). `tried`: each candidate's
    relative error, in order; `divergence`: of the model's predictions, by the first one alone;
    `weight` None: it stays as it was."""

    modules: tuple[str, ...]
    name: str
    tried: tuple[float, ...]
    divergence: float
    weight: QuantizedWeight | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """One matrix in all candidates' formats, and the relative errors of their products."""

    modules: tuple[str, ...]
    weights: tuple[QuantizedWeight, ...]
    errors: tuple[float, ...]


def quantize_model(
    source: Path,
    target: Path,
    wish: str,
    *,
    tokens: Sequence[int],
    progress: Progress = silent,
) -> list[Rounded]:
    """Read the model in `source`, calibrate on `tokens`, write `target` (a new folder).

    `wish` is a key of `WISHES`. Raises `ModelError` if the model is quantised already or
    `target` exists, `ValueError` for a text shorter than a window.
    """
    weights = Weights(source)
    if weights.config.quantization is not None:
        raise ModelError(f"{source} is quantised already")
    if target.exists():
        raise ModelError(f"{target} exists already; name a new folder")
    if len(tokens) < WINDOW:
        raise ValueError(f"the calibration text has {len(tokens)} tokens; {WINDOW} is the least")
    program = build_program(weights.config, weights, torch.float32, context_limit=WINDOW)
    modules = iter(matrix_modules(weights.config))
    matrices = sum(isinstance(op, Linear) for op in program.ops)
    trials: list[_Trial] = []

    def observe(op: Linear, x_TK: Tensor) -> None:
        trials.append(_tried(tuple(next(modules)), op, x_TK, WISHES[wish].candidates))
        progress("rounding the matrices", len(trials), matrices)

    window = min(WINDOW, weights.config.context_limit // PAGE * PAGE)
    windows = [tokens[first : first + window] for first in range(0, len(tokens), window)]
    whole = [each for each in windows if len(each) == window]
    read_windows(TorchExecutor(program, observe=observe), whole, logit_every=HEAD_EVERY)
    first = [trial.weights[0] for trial in trials]
    alone = divergences(program, whole[0][:TEXT_TOKENS], first, progress)
    rounded = _chosen(trials, alone, WISHES[wish])
    target.mkdir(parents=True)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if "index.json" not in file.name and file.name != "manifest.json":
                shutil.copy(file, target / file.name)
    write_checkpoint(target, weights, [(r.modules, r.weight) for r in rounded if r.weight])
    return rounded


def _tried(
    modules: tuple[str, ...], op: Linear, x_TK: Tensor, candidates: tuple[Candidate, ...]
) -> _Trial:
    weight_NK = op.weight_NK
    assert isinstance(weight_NK, Tensor)
    sample = x_TK[:: max(1, len(x_TK) // ERROR_ROWS)]
    exact = sample @ weight_NK.T
    found = []
    for candidate in candidates:
        if candidate.by_error:
            weight = round_by_error(weight_NK, x_TK, candidate.scheme)
        else:
            weight = quantize_weight(weight_NK, candidate.scheme)
        got = quantized_linear_reference(sample, weight)
        found.append((weight, float((got - exact).norm() / exact.norm())))
    weights, errors = zip(*found, strict=True)
    return _Trial(modules=modules, weights=weights, errors=errors)


def _chosen(trials: list[_Trial], alone: list[float], wish: Wish) -> list[Rounded]:
    """A candidate's divergence is taken to go with the square of its error."""
    estimates, costs = [], []
    for trial, divergence in zip(trials, alone, strict=True):
        first = max(trial.errors[0], 1e-30)
        estimates.append([*(divergence * (e / first) ** 2 for e in trial.errors), 0.0])
        rows, columns = trial.weights[0].shape
        each = (*(candidate.cost for candidate in wish.candidates), BFLOAT16_COST)
        costs.append([rows * columns * cost for cost in each])
    names = (*(candidate.name for candidate in wish.candidates), "bfloat16")
    return [
        Rounded(
            modules=trial.modules,
            name=names[at],
            tried=trial.errors,
            divergence=divergence,
            weight=(*trial.weights, None)[at],
        )
        for trial, divergence, at in zip(
            trials, alone, widen(estimates, costs, wish.budget), strict=True
        )
    ]
