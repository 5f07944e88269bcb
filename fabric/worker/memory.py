"""How large the KV pools are: what is asked for, what is free, and what can ever be used."""

from __future__ import annotations

from dataclasses import dataclass

from fabric.core.errors import ConfigError

SHARE_OF_FREE = 0.6  # the rest is for activations, the host pool, the other processes
CPU_DEFAULT_BYTES_MAX = 1 << 30  # without a wish: a laptop stays usable


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolWish:
    """What the pools are for. `device_bytes` None: as much as makes sense. Lengths in tokens.

    `sharers`: so many workers take theirs from the same machine's memory (on a GPU only the host
    pools do).
    """

    block_size: int
    max_sequences: int
    context_limit: int
    device_bytes: int | None
    host_bytes: int
    sharers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSizes:
    """How many blocks each pool has. `context_limit`: the longest sequence that fits, in tokens."""

    num_blocks: int
    num_host_blocks: int
    context_limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Resident bytes of one worker, for the log and for `fabric status`. `rope_bytes`: the
    positions' cosines and sines. A host pool on the CPU is resident only where it was used."""

    weight_bytes: int
    rope_bytes: int
    kv_pool_bytes: int
    host_pool_bytes: int


def size_pools(
    wish: PoolWish, *, block_bytes: int, free_device_bytes: int, free_host_bytes: int, is_cpu: bool
) -> PoolSizes:
    """The pools that `wish` gets. Raises `ValueError` when not even one sequence fits.

    Without a wish: a share of what is free, but never more than all sequences can fill, and on
    the CPU, where the pool competes with everything else, at most 1 GiB.
    """
    free_host_bytes //= wish.sharers
    if is_cpu:
        free_device_bytes //= wish.sharers
    sequence_blocks = -(-wish.context_limit // wish.block_size)
    useful_bytes = wish.max_sequences * sequence_blocks * block_bytes
    if wish.device_bytes is not None:
        device_bytes = wish.device_bytes
        if device_bytes > free_device_bytes:
            raise ValueError(
                f"a KV pool of {_mib(device_bytes)} was asked for, but only "
                f"{_mib(free_device_bytes)} of memory is free"
            )
    else:
        device_bytes = min(int(free_device_bytes * SHARE_OF_FREE), useful_bytes)
        if is_cpu:
            device_bytes = min(
                device_bytes, max(CPU_DEFAULT_BYTES_MAX, sequence_blocks * block_bytes)
            )
            device_bytes = min(device_bytes, int(free_device_bytes * SHARE_OF_FREE))
    num_blocks = device_bytes // block_bytes
    if num_blocks < 2:
        raise ValueError(
            f"a KV pool of {_mib(device_bytes)} holds fewer than two blocks of {_mib(block_bytes)}"
        )
    left_bytes = free_host_bytes - (num_blocks * block_bytes if is_cpu else 0)
    host_bytes = min(wish.host_bytes, max(int(left_bytes * SHARE_OF_FREE), 0))
    return PoolSizes(
        num_blocks=num_blocks,
        num_host_blocks=host_bytes // block_bytes,
        context_limit=min(wish.context_limit, num_blocks * wish.block_size),
    )


def require_room(wanted_bytes: int, free_bytes: int, *, device: str) -> None:
    """Before weights are loaded: a machine that runs out of memory kills who asks last, and says
    nothing. Raises `ConfigError` with both numbers."""
    if wanted_bytes > free_bytes:
        raise ConfigError(
            f"model.source: its weights need {wanted_bytes:,} bytes ({_mib(wanted_bytes)}) on "
            f"{device}, and {free_bytes:,} bytes ({_mib(free_bytes)}) are free; shard.tp or "
            "shard.pp spread them over workers, model.quantization makes them smaller"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
