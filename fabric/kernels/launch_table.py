"""Which launch each kernel gets: a table by (operation, format, bucket of shapes) for each target.

The entries come from analysis, not from a clock (no GPU was at hand): tiles of 128 rows where there
are rows, because that is what wgmma wants; as many stages as shared memory holds twice over; widths
that make loads of 16 bytes. `fabric tune` times the alternatives on the user's own GPU and writes a
file whose entries replace these. `python -m fabric.kernels.gate` compiles every one of them.

A format or operation that a target cannot run has no entry there: e4m3fn on gfx942 and sm_80.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fabric.kernels.launch import Launch

H100_PROCESSORS = 132  # of the SXM board


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class LaunchKey:
    """`operation`: a kernel's name; `form`: number format of what it reads ("bf16", "fp8",
    "fp8 blocks", "int8"); `bucket`: the shapes, in words of `row_bucket` or `width_bucket`."""

    operation: str
    form: str
    bucket: str


class LaunchTable:
    """The launches of one target ("sm_90", "sm_80", "gfx942"). Raises `ValueError` for another."""

    def __init__(self, target: str, tuned: Mapping[LaunchKey, Launch] | None = None) -> None:
        if target not in _TABLES:
            known = ", ".join(_TABLES)
            raise ValueError(f"no kernels are known to run on {target}; there are {known}")
        self.target = target
        self._entries = {**_TABLES[target], **(tuned or {})}

    def pick(self, operation: str, form: str, bucket: str) -> Launch:
        """Raises `ValueError` where the target cannot run it."""
        key = LaunchKey(operation=operation, form=form, bucket=bucket)
        if key not in self._entries:
            raise ValueError(f"{self.target} has no {operation} of {form} for {bucket}")
        return self._entries[key]

    def entries(self) -> Mapping[LaunchKey, Launch]:
        """All of them, tuned ones in place."""
        return self._entries


def row_bucket(rows: int) -> str:
    """Of a product: how many rows it has."""
    return "16 rows" if rows <= 16 else "64 rows" if rows <= 64 else "many rows"


def width_bucket(width: int) -> str:
    """Of what works on whole rows: how wide they are."""
    for limit in (128, 1024, 4096, 16384):
        if width <= limit:
            return f"{limit} wide"
    raise ValueError(f"no kernel works on rows of {width}")


def head_bucket(head_dim: int) -> str:
    """Of attention: head_dim, as it is padded."""
    for limit in (64, 128, 256):
        if head_dim <= limit:
            return f"head {limit}"
    raise ValueError(f"no kernel attends with heads of {head_dim}")


def tuned_path(folder: Path, target: str) -> Path:
    """Where `fabric tune` writes, and where a GPU's executor looks."""
    return folder / f"launches-{target}.json"


def read_tuned(path: Path, target: str) -> dict[LaunchKey, Launch]:
    """What `fabric tune` wrote for `target`. Raises `ValueError` for a file that it did not write
    or that is for another target."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["target"] != target:
            raise ValueError(f"{path} was tuned on {content['target']}, this is {target}")
        return {
            LaunchKey(operation=e["operation"], form=e["form"], bucket=e["bucket"]): Launch(
                sizes=tuple((str(name), int(size)) for name, size in e["sizes"].items()),
                warps=int(e["warps"]),
                stages=int(e["stages"]),
            )
            for e in content["entries"]
        }
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no table of launches: {error!r}") from error


def write_tuned(
    path: Path, *, target: str, device: str, entries: Mapping[LaunchKey, Launch]
) -> None:
    """A file for `read_tuned`; `device` is for its reader."""
    listed = [
        {
            "operation": key.operation,
            "form": key.form,
            "bucket": key.bucket,
            "sizes": dict(launch.sizes),
            "warps": launch.warps,
            "stages": launch.stages,
        }
        for key, launch in sorted(entries.items())
    ]
    content = {"target": target, "device": device, "entries": listed}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _entry(words: str, warps: int, stages: int, **sizes: int) -> tuple[LaunchKey, Launch]:
    operation, form, bucket = (word.strip() for word in words.split("|"))
    key = LaunchKey(operation=operation, form=form, bucket=bucket)
    return key, Launch(sizes=tuple(sizes.items()), warps=warps, stages=stages)


# What moves bytes and computes little: enough warps to have its bytes in flight, no pipeline.
_ROWS: Mapping[LaunchKey, Launch] = dict(
    (
        _entry("rms_norm | bf16 | 128 wide", 4, 1, ROWS=16),
        _entry("rms_norm | bf16 | 1024 wide", 4, 1, ROWS=1),
        _entry("rms_norm | bf16 | 4096 wide", 8, 1, ROWS=1),
        _entry("rms_norm | bf16 | 16384 wide", 16, 1, ROWS=1),
        _entry("rope | bf16 | any", 4, 1, HEADS=8),
        _entry("silu_mul | bf16 | any", 4, 1, BLOCK=1024),
        _entry("kv_write | bf16 | any", 4, 1, HEADS=8),
        _entry("embedding | bf16 | any", 4, 1, BLOCK=1024),
        _entry("copy_blocks | bytes | any", 4, 1, BLOCK=1024),
        _entry("draw | fp32 | any", 16, 1, BLOCK=4096),
        _entry("quantize | int8 | 128 wide", 1, 1),
        _entry("quantize | int8 | 1024 wide", 4, 1),
        _entry("quantize | int8 | 4096 wide", 8, 1),
        _entry("quantize | int8 | 16384 wide", 16, 1),
        _entry("quantize | fp8 | 128 wide", 1, 1),
        _entry("quantize | fp8 | 1024 wide", 4, 1),
        _entry("quantize | fp8 | 4096 wide", 8, 1),
        _entry("quantize | fp8 | 16384 wide", 16, 1),
    )
)

# Decode attention and products of few rows are bound by memory: deep pipelines. Prefill attention
# and products of many rows by the tensor cores: tiles as large as registers hold without a spill
# (128 x 256 spilled at 8 warps).
_SM90: Mapping[LaunchKey, Launch] = {
    **_ROWS,
    **dict(
        (
            _entry("kv_write | fp8 | any", 4, 1, HEADS=8),
            _entry("paged_attention | bf16 | head 64", 4, 3, SPLIT_KEYS=512, BLOCK=64),
            _entry("paged_attention | bf16 | head 128", 4, 3, SPLIT_KEYS=512, BLOCK=64),
            _entry("paged_attention | bf16 | head 256", 4, 3, SPLIT_KEYS=512, BLOCK=32),
            _entry("paged_attention | fp8 | head 64", 4, 3, SPLIT_KEYS=512, BLOCK=64),
            _entry("paged_attention | fp8 | head 128", 4, 3, SPLIT_KEYS=512, BLOCK=64),
            _entry("paged_attention | fp8 | head 256", 4, 3, SPLIT_KEYS=512, BLOCK=32),
            _entry("prefill_attention | bf16 | head 64", 4, 3, ROWS=128, BLOCK=64),
            _entry("prefill_attention | bf16 | head 128", 8, 3, ROWS=128, BLOCK=64),
            _entry("prefill_attention | bf16 | head 256", 8, 2, ROWS=128, BLOCK=32),
            _entry("prefill_attention | fp8 | head 64", 4, 3, ROWS=128, BLOCK=64),
            _entry("prefill_attention | fp8 | head 128", 8, 3, ROWS=128, BLOCK=64),
            _entry("prefill_attention | fp8 | head 256", 8, 2, ROWS=128, BLOCK=32),
            _entry("logits | bf16 | 16 rows", 4, 4, BLOCK_M=16, BLOCK_N=128, BLOCK_K=128),
            _entry("logits | bf16 | 64 rows", 4, 4, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64),
            _entry("logits | bf16 | many rows", 8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
            _entry("moe_gemm | bf16 | 16 rows", 4, 4, BLOCK_M=16, BLOCK_N=128, BLOCK_K=128),
            _entry("moe_gemm | bf16 | 64 rows", 4, 4, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64),
            _entry("moe_gemm | bf16 | many rows", 8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
            *(
                entry
                for form in ("fp8", "fp8 blocks", "int8")
                for entry in (
                    _entry(
                        f"scaled_gemm | {form} | 16 rows",
                        4,
                        4,
                        BLOCK_M=16,
                        BLOCK_N=128,
                        BLOCK_K=128,
                        SWAP=1,
                    ),
                    _entry(
                        f"scaled_gemm | {form} | 64 rows",
                        4,
                        4,
                        BLOCK_M=64,
                        BLOCK_N=128,
                        BLOCK_K=128,
                        SWAP=1,
                    ),
                    _entry(
                        f"scaled_gemm | {form} | many rows",
                        8,
                        3,
                        BLOCK_M=128,
                        BLOCK_N=128,
                        BLOCK_K=128,
                        PROGRAMS=H100_PROCESSORS,
                    ),
                )
            ),
        )
    ),
}

# Ampere: 163 KB of shared memory, no wgmma, no TMA, no fp8.
_SM80: Mapping[LaunchKey, Launch] = {
    **{key: launch for key, launch in _ROWS.items() if key.form != "fp8"},
    **dict(
        (
            _entry("paged_attention | bf16 | head 64", 4, 3, SPLIT_KEYS=512, BLOCK=64),
            _entry("paged_attention | bf16 | head 128", 4, 3, SPLIT_KEYS=512, BLOCK=64),
            _entry("paged_attention | bf16 | head 256", 4, 2, SPLIT_KEYS=512, BLOCK=32),
            _entry("prefill_attention | bf16 | head 64", 4, 3, ROWS=64, BLOCK=64),
            _entry("prefill_attention | bf16 | head 128", 8, 2, ROWS=128, BLOCK=64),
            _entry("prefill_attention | bf16 | head 256", 8, 2, ROWS=64, BLOCK=32),
            _entry("logits | bf16 | 16 rows", 4, 3, BLOCK_M=16, BLOCK_N=128, BLOCK_K=128),
            _entry("logits | bf16 | 64 rows", 4, 3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64),
            _entry("logits | bf16 | many rows", 8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
            _entry("moe_gemm | bf16 | 16 rows", 4, 3, BLOCK_M=16, BLOCK_N=128, BLOCK_K=128),
            _entry("moe_gemm | bf16 | 64 rows", 4, 3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64),
            _entry("moe_gemm | bf16 | many rows", 8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
            _entry("scaled_gemm | int8 | 16 rows", 4, 4, BLOCK_M=16, BLOCK_N=128, BLOCK_K=128),
            _entry("scaled_gemm | int8 | 64 rows", 4, 3, BLOCK_M=64, BLOCK_N=128, BLOCK_K=128),
            _entry("scaled_gemm | int8 | many rows", 8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
        )
    ),
}

# AMD MI300: warps of 64 lanes, so half as many for the same bytes a lane; 64 KB of shared memory;
# "fp8" is e4m3fnuz there, and there are no fp8 pages.
_GFX942: Mapping[LaunchKey, Launch] = {
    **{key: replace(launch, warps=max(launch.warps // 2, 1)) for key, launch in _ROWS.items()},
    **dict(
        (
            _entry("rope | bf16 | any", 2, 1, HEADS=16),
            _entry("paged_attention | bf16 | head 64", 4, 2, SPLIT_KEYS=512, BLOCK=64),
            _entry("paged_attention | bf16 | head 128", 4, 2, SPLIT_KEYS=512, BLOCK=64),
            _entry("paged_attention | bf16 | head 256", 4, 2, SPLIT_KEYS=512, BLOCK=32),
            _entry("prefill_attention | bf16 | head 64", 4, 2, ROWS=128, BLOCK=32),
            _entry("prefill_attention | bf16 | head 128", 8, 2, ROWS=128, BLOCK=32),
            _entry("prefill_attention | bf16 | head 256", 8, 1, ROWS=64, BLOCK=32),
            _entry("logits | bf16 | 16 rows", 4, 2, BLOCK_M=16, BLOCK_N=128, BLOCK_K=64),
            _entry("logits | bf16 | 64 rows", 4, 2, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64),
            _entry("logits | bf16 | many rows", 8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
            _entry("moe_gemm | bf16 | 16 rows", 4, 2, BLOCK_M=16, BLOCK_N=128, BLOCK_K=64),
            _entry("moe_gemm | bf16 | 64 rows", 4, 2, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64),
            _entry("moe_gemm | bf16 | many rows", 8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
            _entry("scaled_gemm | fp8 | 16 rows", 4, 2, BLOCK_M=16, BLOCK_N=128, BLOCK_K=128),
            _entry("scaled_gemm | fp8 | 64 rows", 4, 2, BLOCK_M=64, BLOCK_N=128, BLOCK_K=128),
            _entry("scaled_gemm | fp8 | many rows", 8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=128),
            _entry("scaled_gemm | int8 | 16 rows", 4, 2, BLOCK_M=16, BLOCK_N=128, BLOCK_K=128),
            _entry("scaled_gemm | int8 | 64 rows", 4, 2, BLOCK_M=64, BLOCK_N=128, BLOCK_K=128),
            _entry("scaled_gemm | int8 | many rows", 8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        )
    ),
}

_TABLES: Mapping[str, Mapping[LaunchKey, Launch]] = {
    "sm_90": _SM90,
    "sm_80": _SM80,
    "gfx942": _GFX942,
}
