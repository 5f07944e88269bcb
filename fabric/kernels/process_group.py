"""`ProcessGroupCollective`: a group over torch.distributed, between machines or GPUs.

gloo carries CPU tensors over TCP; NCCL those of CUDA devices, one a rank. The NCCL
side is the same code over another backend and has not been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from fabric.kernels.collective import CollectiveError

TIMEOUT_S = 60.0


class ProcessGroupCollective:
    """Rank `rank` of `size`; `store` is the key-value store through which they find each other,
    `name` tells groups on the same store apart. Made by `gloo` or `nccl`."""

    def __init__(self, group: Any, rank: int, size: int, timeout_s: float) -> None:
        self._group = group
        self._rank, self._size = rank, size
        self._timeout = timedelta(seconds=timeout_s)
        self._tag = 0  # order tells messages apart

    @classmethod
    def gloo(
        cls,
        store: Store,
        name: str,
        rank: int,
        size: int,
        *,
        host: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> ProcessGroupCollective:
        """Over TCP, bound to this machine's address `host`. Raises `CollectiveError`."""
        try:
            options = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [distributed.ProcessGroupGloo.create_device(hostname=host)]
            options._timeout = timedelta(seconds=timeout_s)
            group = distributed.ProcessGroupGloo(PrefixStore(name, store), rank, size, options)
        except RuntimeError as error:
            raise CollectiveError(f"the gloo group {name} did not form: {error}") from None
        return cls(group, rank, size, timeout_s)

    @classmethod
    def nccl(
        cls,
        store: Store,
        name: str,
        rank: int,
        size: int,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> ProcessGroupCollective:
        """Between the current CUDA devices of the ranks. Not run on a GPU yet."""
        try:
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=timeout_s)
            group = distributed.ProcessGroupNCCL(PrefixStore(name, store), rank, size, options)
        except (AttributeError, RuntimeError) as error:
            raise CollectiveError(f"the NCCL group {name} did not form: {error}") from None
        return cls(group, rank, size, timeout_s)

    @property
    def rank(self) -> int:
        """This worker's number, from 0."""
        return self._rank

    @property
    def size(self) -> int:
        """How many workers the group has."""
        return self._size

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """As `Collective` says."""
        gathered = [torch.empty_like(tensor) for _ in range(self._size)]
        self._wait("allgather", [gathered], [tensor])
        return gathered

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """As `Collective` says."""
        total, *others = self.all_gather(tensor)
        for other in others:
            total += other
        return total

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """As `Collective` says."""
        rows = torch.tensor([len(part) for part in parts], device=parts[0].device)
        incoming = torch.stack(self.all_gather(rows))[:, self._rank].tolist()
        sent = torch.cat(list(parts))
        received = sent.new_empty((sum(incoming), *sent.shape[1:]))
        self._wait("alltoall_base", received, sent, incoming, rows.tolist())
        return list(received.split(incoming))

    def send(self, tensor: Tensor, to: int) -> None:
        """As `Collective` says."""
        self._wait("send", [tensor], to, self._tag)

    def receive(self, into: Tensor, source: int) -> Tensor:
        """As `Collective` says."""
        self._wait("recv", [into], source, self._tag)
        return into

    def barrier(self) -> None:
        """As `Collective` says."""
        self._wait("barrier")

    def close(self) -> None:
        """As `Collective` says."""
        if self._group is not None:
            self._group.shutdown()
            self._group = None

    def _wait(self, operation: str, *arguments: Any) -> None:
        if self._group is None:
            raise CollectiveError("the group is closed")
        try:
            getattr(self._group, operation)(*arguments).wait(self._timeout)
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            raise CollectiveError(
                f"rank {self._rank} lost its group in {operation}: {text}"
            ) from None
