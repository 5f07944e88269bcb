"""A worker as a member of a group: it meets the others, then lives on the plans of a channel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fabric.core.errors import ConfigError
from fabric.core.shard import Place
from fabric.kernels.device import choose_device
from fabric.worker.channel import Channel, ChannelClosed
from fabric.worker.links import GroupAddress, open_links
from fabric.worker.plan_codec import decode_plan, encode_result
from fabric.worker.plan_ring import RingChannel
from fabric.worker.plan_socket import connect
from fabric.worker.runner import KernelBuild
from fabric.worker.worker import Worker

CONNECT_TIMEOUT_S = 60.0
RESULT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSettings:
    """What each worker of a group loads; the fields are `Worker`'s and `KernelBuild`'s.

    `folder`, `cache_folder`: the same paths on every machine.
    """

    folder: Path
    cache_folder: Path
    dtype: str
    device: str
    threads: int
    context_limit: int | None


def open_member(place: Place, address: GroupAddress, settings: MemberSettings) -> Worker:
    """Meet the other workers, who do the same at the same time, and load the slice of `place`.

    Raises what `open_links` and `Worker` do.
    """
    try:
        device = choose_device(settings.device).type
    except ValueError as error:
        raise ConfigError(f"model.device: {error}") from None
    cache = settings.cache_folder
    return Worker(
        settings.folder,
        dtype=settings.dtype,
        device=device,
        context_limit=settings.context_limit,
        build=KernelBuild(cache_folder=cache, threads=settings.threads),
        links=open_links(place, address, device=device, cache_folder=cache),
    )


def run_plans(worker: Worker, address: str) -> None:
    """Execute what comes over the channel at `address` until it closes. Raises what a step raises,
    after closing the channel and leaving the group: the others then hear of it at once."""
    is_ring = address.startswith("/")
    channel: Channel = (
        RingChannel.attach(address) if is_ring else connect(address, CONNECT_TIMEOUT_S)
    )
    try:
        while True:
            result = worker.execute(decode_plan(channel.receive(None)))
            if result is not None:
                channel.send(encode_result(result), RESULT_TIMEOUT_S)
    except ChannelClosed:
        return
    finally:
        channel.close()
        worker.close()
