"""`fabric quantize` and `fabric eval`: what they ask for, do and print.

Whoever calls brings what is no part of a model: how its text becomes tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fabric.core.errors import ConfigError, ModelError
from fabric.kernels.executor import create_executor
from fabric.kernels.program import Executor
from fabric.kernels.quantized import WeightFormat
from fabric.kernels.quantized_program import SCHEMES
from fabric.kernels.torch_executor import TorchExecutor
from fabric.model.config import load_config
from fabric.model.decoder import build_program
from fabric.model.evaluate import MOST_LOSS_PERCENT, Evaluation, evaluate
from fabric.model.flags import EVAL_WINDOW, eval_parser, quantize_parser
from fabric.model.progress import Progress
from fabric.model.quantize import Rounded, quantize_model
from fabric.model.source import ModelFolder, resolve_model
from fabric.model.weights import Weights


@dataclass(frozen=True, slots=True)
class Surroundings:
    """`encode`: text to tokens of the model in that folder. `cache`: of models and kernels."""

    encode: Callable[[Path, str], list[int]]
    cache: Path
    progress: Progress


def quantize(words: Sequence[str], surroundings: Surroundings) -> int:
    """`fabric quantize WORDS...`: the exit code."""
    arguments = quantize_parser().parse_args(words)
    model = resolve_model(arguments.model, surroundings.cache, surroundings.progress)
    tokens = _tokens(model, arguments.text, arguments.tokens, surroundings)
    try:
        rounded = quantize_model(
            model.path,
            arguments.output,
            arguments.format,
            tokens=tokens,
            progress=surroundings.progress,
        )
    except ValueError as error:
        raise ConfigError(f"--text: {error}") from None
    for one in rounded:
        print(_line(one))
    names = [one.name for one in rounded]
    counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    size = sum(file.stat().st_size for file in arguments.output.glob("*.safetensors"))
    print(f"{arguments.output}: {size / 2**20:,.0f} MiB; matrices: {counts}")
    return 0


def evaluation(words: Sequence[str], surroundings: Surroundings) -> int:
    """`fabric eval WORDS...`: the exit code, 1 for a format that costs more than it may."""
    arguments = eval_parser().parse_args(words)
    model = resolve_model(arguments.model, surroundings.cache, surroundings.progress)
    limit = load_config(model.path).context_limit
    window = arguments.window or min(EVAL_WINDOW, limit)
    executor, formats = _executor(model, arguments.format, window, surroundings)
    base = None
    if arguments.against is not None or arguments.format is not None:
        other = resolve_model(
            arguments.against or arguments.model, surroundings.cache, surroundings.progress
        )
        base, _ = _executor(other, None, window, surroundings)
    tokens = _tokens(model, arguments.text, arguments.tokens, surroundings)
    if len(tokens) < 2:
        raise ConfigError(f"--text: {arguments.text} holds less than two tokens")
    found = evaluate(executor, tokens, base=base, window=window, progress=surroundings.progress)
    print(_report(found, executor))
    loss, limits = found.loss_percent(), [MOST_LOSS_PERCENT[each] for each in formats]
    if loss is None or not limits:
        return 0
    met = loss <= max(limits)
    print(f"gate: {max(limits):g} % for {'/'.join(sorted(formats))}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


def _tokens(
    model: ModelFolder, text: Path, limit: int | None, surroundings: Surroundings
) -> list[int]:
    try:
        tokens = surroundings.encode(model.path, text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text: can't read {text}: {error}") from None
    return tokens[:limit]


def _executor(
    model: ModelFolder, number_format: str | None, window: int, surroundings: Surroundings
) -> tuple[Executor, set[WeightFormat]]:
    """With what its weights are quantised by."""
    weights = Weights(model.path)
    if not 2 <= window <= weights.config.context_limit:
        raise ConfigError(f"--window: 2 to {weights.config.context_limit}, not {window}")
    stored = weights.config.quantization
    formats = {storage.scheme.format for _, storage in stored.groups} if stored else set()
    if number_format is not None:
        if stored:
            raise ModelError(f"{model.path} is quantised already; leave --format out")
        formats.add(SCHEMES[number_format].format)
    program = build_program(
        weights.config, weights, torch.bfloat16, context_limit=window, rounding=number_format
    )
    if WeightFormat.FP8 in formats:  # `create_executor` would keep the activations bfloat16
        return TorchExecutor(program), formats
    kernels = surroundings.cache / "kernels"
    return create_executor(program, device="cpu", cache_folder=kernels), formats


def _line(one: Rounded) -> str:
    errors = ", ".join(f"{error:.4f}" for error in one.tried)
    more = " …" * (len(one.modules) > 1)
    return f"{one.modules[0]}{more:<3} {one.name} (errors: {errors}; KL {one.divergence:.5f})"


def _report(found: Evaluation, executor: Executor) -> str:
    line = f"perplexity {found.perplexity:.3f} over {found.tokens} tokens ({executor.description})"
    change = found.loss_percent()
    if change is None:
        return line
    return (
        f"{line}\nbase {found.base_perplexity:.3f}: {change:+.2f} %; "
        f"same likeliest token {100 * (found.agreement or 0):.1f} %, "
        f"KL {found.divergence:.5f} nats a token"
    )
