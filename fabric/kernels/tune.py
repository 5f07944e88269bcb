"""`fabric tune`: time the launches of the heavy kernels on this machine's GPU, keep the fastest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from fabric.kernels.cpu.build import default_cache_folder
from fabric.kernels.cuda.executor import target_of
from fabric.kernels.launch import Launch
from fabric.kernels.launch_table import LaunchKey, LaunchTable, tuned_path, write_tuned
from fabric.kernels.linear import logits
from fabric.kernels.moe_gemm import moe_gemm, schedule_experts
from fabric.kernels.paged_attention import (
    Decoding,
    PagedKv,
    Partials,
    paged_attention,
    split_count,
)
from fabric.kernels.prefill_attention import Prefill, prefill_attention, tiles
from fabric.kernels.quantize import quantize
from fabric.kernels.scaled_gemm import Scaled, scaled_gemm

HELP = """\
Times the launches of the heavy kernels on this machine's GPU and keeps the fastest.

Each entry of the table is tried as it is and with other tiles, warps and stages, on the shapes
that the compile gate takes (an 8B model). Results are the same whatever the launch, but for the
order of sums, so the fastest is simply the best. The next start of `fabric serve` reads the file.

examples:
  fabric tune
  fabric tune --output launches.json"""

Timer = Callable[[Callable[[], None]], float]
# What may be tried in place of an entry's own value.
_CHOICES: Mapping[str, tuple[int, ...]] = {
    "BLOCK": (32, 64, 128),
    "SPLIT_KEYS": (256, 512, 1024),
    "ROWS": (64, 128),
    "BLOCK_N": (64, 128, 256),
    "BLOCK_K": (64, 128),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The shapes to time: an 8B model's, or in tests small ones."""

    hidden: int = 4096
    outputs: int = 28_672
    vocab: int = 128_256
    heads: int = 32
    kv_heads: int = 8
    experts: int = 8
    sequences: int = 64
    context: int = 4096
    prompt: int = 2048
    page: int = 16


def main(words: Sequence[str] | None = None) -> int:
    """Exit code 2 without a GPU."""
    given = parser().parse_args(words)
    if not torch.cuda.is_available():
        print("fabric: tune needs a GPU, and torch sees none here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    try:
        table = LaunchTable(target_of(device))
    except ValueError as error:
        print(f"fabric: {error}", file=sys.stderr)
        return 2
    path = given.output or tuned_path(default_cache_folder(), table.target)
    entries = tune(table.entries(), device, Sizes(), timer=_time_ms, progress=print)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device)
    write_tuned(path, target=table.target, device=name, entries=entries)
    print(f"{path}: {len(entries)} launches of {name}; read at the next start")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    command = argparse.ArgumentParser(
        prog="fabric tune",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="(default: where `fabric serve` looks)"
    )
    return command


def tune(
    table: Mapping[LaunchKey, Launch],
    device: torch.device,
    sizes: Sizes,
    *,
    timer: Timer,
    progress: Callable[[str], None],
) -> dict[LaunchKey, Launch]:
    """The fastest launch of each entry that is worth timing. One that does not compile or does not
    fit the GPU is passed over."""
    best: dict[LaunchKey, Launch] = {}
    for key, launch in table.items():
        if key.operation not in _WORKLOADS:
            continue
        work = _WORKLOADS[key.operation](key, sizes, device)
        times: dict[Launch, float] = {}
        for candidate in candidates(launch):
            try:
                times[candidate] = timer(work(candidate))
            except (RuntimeError, triton.TritonError) as error:
                progress(f"  {candidate}: {type(error).__name__}")
        if not times:
            continue
        best[key] = min(times, key=lambda each: times[each])
        progress(
            f"{key.operation} {key.form} {key.bucket}: {times[best[key]] * 1e3:.1f} us"
            f" (table: {times.get(launch, float('nan')) * 1e3:.1f}) {dict(best[key].sizes)}"
        )
    return best


def candidates(launch: Launch) -> Iterator[Launch]:
    """The launch itself, then one thing changed at a time."""
    yield launch
    for warps in (4, 8):
        if warps != launch.warps:
            yield replace(launch, warps=warps)
    for stages in (2, 3, 4, 5):
        if stages != launch.stages:
            yield replace(launch, stages=stages)
    for name, size in launch.sizes:
        for choice in _CHOICES.get(name, ()):
            if choice != size:
                changed = tuple((n, choice if n == name else s) for n, s in launch.sizes)
                yield replace(launch, sizes=changed)


Workload = Callable[[Launch], Callable[[], None]]


def _rows_of(key: LaunchKey, sizes: Sizes) -> int:
    return {"16 rows": 16, "64 rows": 64}.get(key.bucket, sizes.prompt)


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(torch.bfloat16)


def _logits(key: LaunchKey, sizes: Sizes, device: torch.device) -> Workload:
    rows = _rows_of(key, sizes)
    x = _normal(device, rows, sizes.hidden)
    weight = _normal(device, sizes.vocab, sizes.hidden)
    every = torch.arange(rows, dtype=torch.int32, device=device)
    out = torch.empty(rows, sizes.vocab, device=device)
    return lambda launch: lambda: logits(x, every, weight, out=out, launch=launch)


def _moe(key: LaunchKey, sizes: Sizes, device: torch.device) -> Workload:
    rows = _rows_of(key, sizes)
    x = _normal(device, rows, sizes.hidden)
    weight = _normal(device, sizes.experts, sizes.outputs // 2, sizes.hidden)
    experts = torch.randint(0, sizes.experts, (rows, 2), device=device)
    out = torch.empty(2 * rows, sizes.outputs // 2, dtype=torch.bfloat16, device=device)

    def work(launch: Launch) -> Callable[[], None]:
        schedule = schedule_experts(experts, sizes.experts, launch.size("BLOCK_M"))
        return lambda: moe_gemm(x, weight, schedule, out_AN=out, launch=launch)

    return work


def _scaled(key: LaunchKey, sizes: Sizes, device: torch.device) -> Workload:
    fp8 = torch.float8_e4m3fnuz if torch.version.hip else torch.float8_e4m3fn
    dtype = torch.int8 if key.form == "int8" else fp8
    blocks = "blocks" in key.form

    def operand(rows: int) -> Scaled:
        x = _normal(device, rows, sizes.hidden)
        values = torch.empty(rows, sizes.hidden, dtype=dtype, device=device)
        scales = torch.empty(rows, sizes.hidden // 128 if blocks else 1, device=device)
        quantize(x, out=values, scales_TJ=scales, launch=Launch(sizes=()))
        return Scaled(values=values, scales=scales)

    a, b = operand(_rows_of(key, sizes)), operand(sizes.outputs)
    if blocks:
        b = Scaled(values=b.values, scales=b.scales[::128].contiguous())
    out = torch.empty(len(a.values), sizes.outputs, dtype=torch.bfloat16, device=device)
    return lambda launch: lambda: scaled_gemm(a, b, out=out, launch=launch)


def _pages(key: LaunchKey, sizes: Sizes, device: torch.device, sequences: int) -> PagedKv:
    head_dim = int(key.bucket.split()[1])
    columns = -(-max(sizes.context, sizes.prompt) // sizes.page)
    shape = (sequences * columns, 2, sizes.kv_heads, sizes.page, head_dim)
    pages = _normal(device, *shape)
    order = torch.randperm(sequences * columns, device=device).to(torch.int32)
    fp8 = key.form == "fp8"
    return PagedKv(
        pages_XKGPE=pages.to(torch.float8_e4m3fn) if fp8 else pages,
        tables_XB=order.view(sequences, columns),
        scale=head_dim**-0.5,
        scales_KG=torch.ones(2, sizes.kv_heads, device=device) if fp8 else None,
    )


def _decode(key: LaunchKey, sizes: Sizes, device: torch.device) -> Workload:
    kv = _pages(key, sizes, device, sizes.sequences)
    q = _normal(device, sizes.sequences, sizes.heads, kv.pages_XKGPE.shape[-1])
    out = torch.empty_like(q)
    every = torch.arange(sizes.sequences, dtype=torch.int32, device=device)
    lengths = torch.full_like(every, sizes.context)
    decoding = Decoding(tokens_S=every, rows_S=every, lengths_S=lengths, longest=sizes.context)

    def work(launch: Launch) -> Callable[[], None]:
        shape = (*q.shape[:2], split_count(sizes.context, launch))
        scratch = Partials(
            attended_SHNE=torch.empty(*shape, q.shape[2], device=device),
            sums_SHN=torch.empty(shape, device=device),
        )
        return lambda: paged_attention(q, kv, decoding, out=out, scratch=scratch, launch=launch)

    return work


def _prefill(key: LaunchKey, sizes: Sizes, device: torch.device) -> Workload:
    kv = _pages(key, sizes, device, 1)
    q = _normal(device, sizes.prompt, sizes.heads, kv.pages_XKGPE.shape[-1])
    out = torch.empty_like(q)
    nothing = torch.zeros(1, dtype=torch.int32, device=device)

    def work(launch: Launch) -> Callable[[], None]:
        listed = tiles([sizes.prompt], sizes.heads // sizes.kv_heads, launch.size("ROWS"))
        sequences, rows = (torch.tensor(x, dtype=torch.int32, device=device) for x in listed)
        prefill = Prefill(
            starts_S=nothing,
            counts_S=nothing + sizes.prompt,
            first_S=nothing,
            rows_S=nothing,
            tile_sequences_N=sequences,
            tile_rows_N=rows,
        )
        return lambda: prefill_attention(q, kv, prefill, out=out, launch=launch)

    return work


def _time_ms(work: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(work, return_mode="median"))


_WORKLOADS: Mapping[str, Callable[[LaunchKey, Sizes, torch.device], Workload]] = {
    "logits": _logits,
    "moe_gemm": _moe,
    "scaled_gemm": _scaled,
    "paged_attention": _decode,
    "prefill_attention": _prefill,
}
