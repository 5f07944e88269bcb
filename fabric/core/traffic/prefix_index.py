"""Which replica probably holds which prefix: what this dispatcher sent where, and nothing else.

A replica keeps the blocks of a prompt until others need their place, so the index forgets as it
does: the least recently used digests of a replica go when it has been sent more than it can hold.
It may be wrong both ways (other dispatchers send too); the price is a prompt computed again, or a
hit that was not reckoned with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from fabric.core.prefix import Hasher, root
from fabric.core.request import Request

# Leading blocks of a prompt that are looked at: what tells prefixes apart stands at the beginning.
MAX_BLOCKS = 256
# Digests of a replica, whatever it says that it can hold.
MAX_DIGESTS = 16_384
MAX_ADAPTERS = 256
MAX_REQUESTS = 64


class PrefixIndex:
    """Digests by replica, least recently used first, and replicas by digest."""

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError("a block has at least one token")
        self.block_size = block_size
        self.hasher = Hasher()
        self._held: dict[str, OrderedDict[bytes, None]] = {}
        self._holders: dict[bytes, dict[str, None]] = {}
        self._adapters: dict[str, OrderedDict[str, None]] = {}
        # A request at the head of a queue is asked about again and again.
        self._chains: OrderedDict[str, tuple[bytes, ...]] = OrderedDict()

    def digests(self, request: Request) -> tuple[bytes, ...]:
        """The hash chain of the prompt's leading full blocks; its last token is never cached."""
        known = self._chains.get(request.request_id)
        if known is not None:
            return known
        size = self.block_size
        parent = root(request.model_version, request.adapter, request.tenant)
        prompt, found = request.prompt, []
        for index in range(min((len(prompt) - 1) // size, MAX_BLOCKS)):
            parent = self.hasher.chain(parent, prompt[index * size : (index + 1) * size])
            found.append(parent)
        self._chains[request.request_id] = tuple(found)
        if len(self._chains) > MAX_REQUESTS:
            self._chains.popitem(last=False)
        return self._chains[request.request_id]

    def match(self, digests: Sequence[bytes]) -> dict[str, int]:
        """Replica -> how many leading blocks it probably holds; only those that hold one."""
        depths: dict[str, int] = {}
        for depth, digest in enumerate(digests):
            holders = [
                name for name in self._holders.get(digest, ()) if depths.get(name, 0) == depth
            ]
            if not holders:
                break
            for name in holders:
                depths[name] = depth + 1
        return depths

    def has_adapter(self, replica_id: str, adapter: str | None) -> bool:
        """It has run this adapter lately (None: no adapter is needed)."""
        return adapter is None or adapter in self._adapters.get(replica_id, ())

    def note(self, replica_id: str, request: Request, most_blocks: int) -> None:
        """A request goes there. `most_blocks`: what the replica can hold; 0: unknown."""
        held = self._held.setdefault(replica_id, OrderedDict())
        # The deepest first: like the replica's own, a chain is forgotten from its end.
        for digest in reversed(self.digests(request)):
            if digest in held:
                held.move_to_end(digest)
            else:
                held[digest] = None
                self._holders.setdefault(digest, {})[replica_id] = None
        while len(held) > min(most_blocks or MAX_DIGESTS, MAX_DIGESTS):
            self._drop(replica_id, held.popitem(last=False)[0])
        self._chains.pop(request.request_id, None)
        if request.adapter is not None:
            adapters = self._adapters.setdefault(replica_id, OrderedDict())
            adapters[request.adapter] = None
            adapters.move_to_end(request.adapter)
            if len(adapters) > MAX_ADAPTERS:
                adapters.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        """The replica is gone, with all that it held."""
        for digest in self._held.pop(replica_id, ()):
            self._drop(replica_id, digest)
        self._adapters.pop(replica_id, None)

    def replicas(self) -> list[str]:
        """All of which something is known."""
        return list(self._held)

    def check(self) -> None:
        """Two views of who holds what; bounds."""
        pairs = {(name, digest) for name, held in self._held.items() for digest in held}
        seen = {(name, digest) for digest, names in self._holders.items() for name in names}
        assert pairs == seen, "replicas by digest, digests by replica"
        assert all(self._holders.values()), "a digest that nobody holds"
        assert all(len(held) <= MAX_DIGESTS for held in self._held.values()), "too many digests"
        assert len(self._chains) <= MAX_REQUESTS, "too many requests"

    def _drop(self, replica_id: str, digest: bytes) -> None:
        holders = self._holders[digest]
        del holders[replica_id]
        if not holders:
            del self._holders[digest]
