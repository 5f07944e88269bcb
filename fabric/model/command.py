"""`fabric quantize` and `fabric eval`: what they ask for, do and print.

Whoever calls brings what is no part of a model: how its text becomes tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fabric.core.errors import ConfigError, ModelError
from fabric.kernels.executor import create_executor
from fabric.kernels.program import Executor
from fabric.kernels.quantized import WeightFormat
from fabric.kernels.quantized_program import SCHEMES, quantize_program
from fabric.kernels.torch_executor import TorchExecutor
from fabric.model.decoder import build_program
from fabric.model.evaluate import Evaluation, evaluate
from fabric.model.progress import Progress
from fabric.model.quantize import CANDIDATES, WINDOW, Rounded, quantize_model
from fabric.model.source import ModelFolder, resolve_model
from fabric.model.weights import Weights

EVAL_WINDOW = 512

QUANTIZE_HELP = """\
Writes a folder of quantised weights that `fabric serve` (and vLLM) loads: compressed-tensors.

Every matrix is rounded with a calibration text in view; one whose outputs err too much stays wider.

examples:
  fabric quantize --format int8 --text calibration.txt -o smollm2-int8
  fabric quantize ~/models/Qwen3-0.6B --format int4 --text calibration.txt -o qwen3-int4
  fabric serve ./smollm2-int8"""

EVAL_HELP = """\
Prints perplexity on a text and, with --against, how near the model stays to another one: the share
of positions with the same likeliest token, and the mean KL divergence.

fp8 weights are evaluated op by op in PyTorch, activations rounded to fp8 as a GPU does it.

examples:
  fabric eval ./smollm2-int8 --against models/smollm2 --text held_out.txt
  fabric eval --format int8 --text held_out.txt"""


@dataclass(frozen=True, slots=True, kw_only=True)
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
    """`fabric eval WORDS...`: the exit code."""
    arguments = eval_parser().parse_args(words)
    model = resolve_model(arguments.model, surroundings.cache, surroundings.progress)
    executor = _executor(model, arguments.format, arguments.window, surroundings)
    base = None
    if arguments.against is not None or arguments.format is not None:
        other = resolve_model(
            arguments.against or arguments.model, surroundings.cache, surroundings.progress
        )
        base = _executor(other, None, arguments.window, surroundings)
    tokens = _tokens(model, arguments.text, arguments.tokens, surroundings)
    if len(tokens) < 2:
        raise ConfigError(f"--text: {arguments.text} holds less than two tokens")
    found = evaluate(
        executor, tokens, base=base, window=arguments.window, progress=surroundings.progress
    )
    print(_report(found, executor))
    return 0


def quantize_parser() -> argparse.ArgumentParser:
    """The flags of `fabric quantize`."""
    parser = _parser("quantize", QUANTIZE_HELP)
    parser.add_argument("--format", required=True, choices=sorted(CANDIDATES))
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="new")
    parser.add_argument(
        "--tokens",
        type=int,
        default=8 * WINDOW,
        metavar="N",
        help="of the text, from its beginning (default: %(default)s)",
    )
    return parser


def eval_parser() -> argparse.ArgumentParser:
    """The flags of `fabric eval`."""
    parser = _parser("eval", EVAL_HELP)
    parser.add_argument("--against", metavar="MODEL", help="compare with this one")
    parser.add_argument(
        "--format",
        choices=sorted(SCHEMES),
        help="round plain weights at load, and compare with those not rounded",
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="of the text, from its beginning (default: all)"
    )
    parser.add_argument(
        "--window", type=int, default=EVAL_WINDOW, metavar="N", help="(default: %(default)s)"
    )
    return parser


def _parser(name: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"fabric {name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder, GGUF file or hub id (default: demo model)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        required=True,
        metavar="FILE",
        help="plain text, UTF-8, of the kind that the model will meet: some thousand words",
    )
    return parser


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
) -> Executor:
    weights = Weights(model.path)
    if not 2 <= window <= weights.config.context_limit:
        raise ConfigError(f"--window: 2 to {weights.config.context_limit}, not {window}")
    program = build_program(weights.config, weights, torch.bfloat16, context_limit=window)
    stored = weights.config.quantization
    formats = [storage.scheme.format for _, storage in stored.groups] if stored else []
    if number_format is not None:
        if stored:
            raise ModelError(f"{model.path} is quantised already; leave --format out")
        formats.append(SCHEMES[number_format].format)
        program = quantize_program(program, SCHEMES[number_format])
    if WeightFormat.FP8 in formats:  # `create_executor` would keep the activations bfloat16
        return TorchExecutor(program)
    return create_executor(program, device="cpu", cache_folder=surroundings.cache / "kernels")


def _line(one: Rounded) -> str:
    errors = ", ".join(f"{error:.4f}" for error in one.tried)
    return f"{one.modules[0]}{' …' * (len(one.modules) > 1):<3} {one.name} (errors: {errors})"


def _report(found: Evaluation, executor: Executor) -> str:
    line = f"perplexity {found.perplexity:.3f} over {found.tokens} tokens ({executor.description})"
    if found.base_perplexity is None:
        return line
    change = 100 * (found.perplexity / found.base_perplexity - 1)
    return (
        f"{line}\nbase {found.base_perplexity:.3f}: {change:+.2f} %; "
        f"same likeliest token {100 * (found.agreement or 0):.1f} %, "
        f"KL {found.divergence:.5f} nats a token"
    )
