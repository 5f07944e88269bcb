"""Devices and their memory: which one to use, how much is free, pools that are ready to be written.

Nothing outside `fabric/kernels` asks torch about CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fabric.kernels.host_memory import huge_page_bytes, touch_soon

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number for "no limit"


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises `ValueError` if the named device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no CUDA device")
    return torch.device(name)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`; on the CPU within the container's limit."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return min((_system_free_bytes(), *_cgroup_free_bytes(_CGROUP)))


def allocate_pool(
    blocks: int, block_bytes: int, device: torch.device, *, soon: bool = False
) -> Tensor:
    """uint8 [blocks, block_bytes], zeroed, so touched: no step pays for its first page faults.
    `soon`: all but the first blocks are touched while others work (`touch_soon`)."""
    if device.type == "cuda":
        return torch.zeros((blocks, block_bytes), dtype=torch.uint8, device=device)
    pool_XB = huge_page_bytes((blocks, block_bytes), touch=not soon)
    if soon:
        touch_soon(pool_XB)
    return pool_XB


def allocate_host_pool(blocks: int, block_bytes: int, device: torch.device) -> Tensor:
    """The same in the host's memory: pinned if `device` copies from it by itself, else untouched,
    because it may never be needed."""
    if device.type == "cuda":
        return torch.zeros((blocks, block_bytes), dtype=torch.uint8, pin_memory=True)
    return huge_page_bytes((blocks, block_bytes), touch=False)


def _system_free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line")


def _cgroup_free_bytes(root: Path) -> Iterator[int]:
    """Head-room under the cgroup's limit, v2 or v1, if there is one. Page cache can be dropped."""
    places = (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    )
    for limit_name, usage_name, stat_name, cache_key in places:
        try:
            limit = (root / limit_name).read_text().strip()
            usage = int((root / usage_name).read_text())
            stat = (root / stat_name).read_text()
        except (OSError, ValueError):
            continue
        if limit == "max" or int(limit) >= _UNLIMITED:
            continue
        fields = dict(line.split() for line in stat.splitlines())
        yield max(int(limit) - usage + int(fields.get(cache_key, 0)), 0)
