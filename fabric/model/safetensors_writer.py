"""Writing a safetensors file tensor by tensor, so that a model larger than memory can be converted.

The same tensors always give the same bytes (the header is ours), so a file can be checked by hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fabric.model.progress import Progress, silent


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    parts: Iterable[Tensor],
    progress: Progress = silent,
) -> None:
    """Write bfloat16 tensors of these names and shapes. `parts` are their values in the same
    order; one tensor may come in several parts (rows)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, shape in shapes.items():
        end = total + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [total, end]}
        total = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        done = 0
        for part in parts:
            assert part.dtype is torch.bfloat16, part.dtype
            done += file.write(part.contiguous().view(torch.uint8).numpy().tobytes())
            progress("converting the weights", done, total)
    assert done == total, (done, total)
