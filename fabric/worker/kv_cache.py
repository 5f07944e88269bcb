"""The KV pages of one worker: a pool on the device, a pool on the host, and copies between them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

from fabric.core.engine.plan import BlockCopy, CopyKind
from fabric.kernels.copier import create_copier
from fabric.kernels.device import allocate_host_pool, allocate_pool
from fabric.kernels.program import KvLayout, KvPool
from fabric.worker.kv_transfer import Part, Staging


class KvCache:
    """Both pools, allocated once. A block is one contiguous run of bytes in either.

    `part`: which of the model's layers and heads. `staging`: blocks between two replicas."""

    def __init__(
        self,
        layout: KvLayout,
        *,
        num_blocks: int,
        num_host_blocks: int,
        device: torch.device,
        part: Part,
    ) -> None:
        block_bytes = layout.block_bytes()
        blocks_XB = allocate_pool(num_blocks, block_bytes, device, soon=True)
        self.pool = KvPool(layout=layout, blocks_XB=blocks_XB)
        self.host_XB = allocate_host_pool(num_host_blocks, block_bytes, device)
        self.staging = Staging(layout, part)
        self._copier = create_copier(device)

    @property
    def device_bytes(self) -> int:
        """Size of the device pool."""
        return self.pool.blocks_XB.numel()

    @property
    def host_bytes(self) -> int:
        """Size of the host pool."""
        return self.host_XB.numel()

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Whole blocks, in the order given: a later copy may read what an earlier one wrote."""
        for kind, group in groupby(copies, key=lambda copy: copy.kind):
            if kind in (CopyKind.EXPORT, CopyKind.IMPORT):
                self._copier.finish()  # those before it in the list may still be under way
                self.staging.copy(group, self.pool.blocks_XB)
                continue
            source_XB, target_XB = self._pools(kind)
            pairs = [(copy.source, copy.target) for copy in group]
            self._copier.copy(source_XB, target_XB, pairs)

    def finish(self) -> None:
        """Return when all copies are done. The next step needs no such wait; the host does, before
        it reads what they wrote or takes their time."""
        self._copier.finish()

    def _pools(self, kind: CopyKind) -> tuple[Tensor, Tensor]:
        device_XB, host_XB = self.pool.blocks_XB, self.host_XB
        match kind:
            case CopyKind.DEVICE:
                return device_XB, device_XB
            case CopyKind.SWAP_OUT:
                return device_XB, host_XB
            case CopyKind.SWAP_IN:
                return host_XB, device_XB
            case _:
                raise ValueError(f"{kind} is not between two pools")
