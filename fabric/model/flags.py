"""The flags of `fabric quantize` and `fabric eval`, apart from what they start: no torch here."""

from __future__ import annotations

import argparse
from pathlib import Path

WISH_NAMES = ("fp8", "int4", "int8")  # the keys of `WISHES`
SCHEME_NAMES = ("fp8", "int4", "int8", "int8_activations")  # the keys of `SCHEMES`
CALIBRATION_TOKENS = 4096
EVAL_WINDOW = 512

QUANTIZE_HELP = """\
Writes a folder of quantised weights that `fabric serve` loads: compressed-tensors, which vLLM reads
too, but for int4, which has minimums that compressed-tensors can't say.

Every matrix is rounded with a calibration text in view; one whose outputs err too much stays wider.

examples:
  fabric quantize --format int8 --text calibration.txt -o smollm2-int8
  fabric quantize ~/models/Qwen3-0.6B --format int4 --text calibration.txt -o qwen3-int4
  fabric serve ./smollm2-int8"""

EVAL_HELP = """\
Prints perplexity on a text and, with --against, how near the model stays to another one: the share
of positions with the same likeliest token, and the mean KL divergence.

A format that costs more perplexity than it may (fp8, int8 1 %, int4 4 %) ends with exit code 1.

fp8 weights are evaluated op by op in PyTorch, activations rounded to fp8 as a GPU does it.

examples:
  fabric eval ./smollm2-int8 --against models/smollm2 --text held_out.txt
  fabric eval --format int8 --text held_out.txt"""


def quantize_parser() -> argparse.ArgumentParser:
    """The flags of `fabric quantize`."""
    parser = _parser("quantize", QUANTIZE_HELP)
    parser.add_argument("--format", required=True, choices=WISH_NAMES)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="new")
    parser.add_argument(
        "--tokens",
        type=int,
        default=CALIBRATION_TOKENS,
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
        choices=SCHEME_NAMES,
        help="round plain weights at load, and compare with those not rounded",
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="of the text, from its beginning (default: all)"
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"tokens read at once (default: {EVAL_WINDOW}, or the model's context)",
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
