"""Where a replica's KV goes in and out: its own worker, or those of its group, and the store.

A group of KV lies in Ray's object store while it travels. It belongs to the process that put it
there, and is gone when that process lets go of the reference, or dies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from fabric.core.engine.plan import KvExport

if TYPE_CHECKING:
    from fabric.worker.kv_transfer import Bytes, GroupHeader, Staging

GET_TIMEOUT_S = 5.0
# For every worker of a group: longer than any of them waits for a step. One that hangs holds no
# thread here for ever.
GROUP_TIMEOUT_S = 15.0


SlotOf = Callable[["GroupHeader"], int]


class KvEnds(Protocol):
    """Blocking verbs, for other threads than the engine's. References are Ray's."""

    def depart(self, export: KvExport) -> list[Any]:
        """Groups with what lies in the slots of `export`, one of each worker, in the store."""
        ...

    def drop(self, export: KvExport) -> None:
        """Nobody wants what lies in the slots of `export`, or will. Returns at once."""
        ...

    def arrive(self, reference: Any, slot_of: SlotOf) -> GroupHeader:
        """Check a group and put it into slots of every worker. Raises `GroupError`, and what
        `slot_of` raises, which is asked when the checksum is right."""
        ...

    def discard(self, slot: int, count: int) -> None:
        """These slots are not wanted."""
        ...


class Store(Protocol):
    """Ray's object store, or a test's."""

    def put(self, group: Bytes) -> Any:
        """A reference to a copy."""
        ...

    def get(self, reference: Any) -> Bytes:
        """What lies there, read only. Raises `GroupError`: it is lost."""
        ...


class ObjectStore:
    """Ray's."""

    def put(self, group: Bytes) -> Any:
        """See `Store`."""
        import ray

        return ray.put(group)

    def get(self, reference: Any) -> Bytes:
        """See `Store`; a view of shared memory."""
        import ray

        from fabric.worker.kv_transfer import GroupError

        try:
            group: Bytes = ray.get(reference, timeout=GET_TIMEOUT_S)
        except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
            raise GroupError("lost") from None
        return group


class OwnEnds:
    """Of a worker in this process."""

    def __init__(self, staging: Staging, store: Store) -> None:
        self._staging = staging
        self._store = store

    def depart(self, export: KvExport) -> list[Any]:
        """See `KvEnds`."""
        group = self._staging.collect(export)
        try:
            return [self._store.put(group)]
        finally:
            self._staging.release(group)

    def drop(self, export: KvExport) -> None:
        """See `KvEnds`."""
        self._staging.drop(export)

    def arrive(self, reference: Any, slot_of: SlotOf) -> GroupHeader:
        """See `KvEnds`."""
        from fabric.worker.kv_transfer import open_group

        header, content = open_group(self._store.get(reference))
        self._staging.place(slot_of(header), header, content)
        return header

    def discard(self, slot: int, count: int) -> None:
        """See `KvEnds`."""
        self._staging.discard(slot, count)


class GroupEnds:
    """Of workers in actors of their own: each puts and gets by itself."""

    def __init__(self, actors: list[Any], store: Store) -> None:
        self._actors = actors
        self._store = store

    def depart(self, export: KvExport) -> list[Any]:
        """See `KvEnds`."""
        import ray

        calls = [actor.collect.remote(export) for actor in self._actors]
        groups = ray.get(calls, timeout=GROUP_TIMEOUT_S)
        return [reference for found in groups for reference in found]

    def drop(self, export: KvExport) -> None:
        """See `KvEnds`."""
        for actor in self._actors:
            actor.drop.remote(export)

    def arrive(self, reference: Any, slot_of: SlotOf) -> GroupHeader:
        """See `KvEnds`."""
        import ray

        from fabric.worker.kv_transfer import GroupError, open_group

        header, _ = open_group(self._store.get(reference))
        slot = slot_of(header)
        try:
            calls = [actor.stage.remote(slot, [reference]) for actor in self._actors]
            ray.get(calls, timeout=GROUP_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            raise GroupError("timeout") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, GroupError):
                raise GroupError(error.cause.reason) from None
            raise
        return header

    def discard(self, slot: int, count: int) -> None:
        """See `KvEnds`."""
        for actor in self._actors:
            actor.discard.remote(slot, count)
