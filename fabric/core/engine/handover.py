"""KV that leaves this engine for another one, and KV that comes: both ends of a hand-over.

    prefill engine                                  decode engine
    export(request)                                 reserve(request): blocks for the whole prompt
    each commit: blocks that became final ──KvExport──> ... ──KvArrival──> landed(arrival)
    the request ends with its first token           add(request, generated=(token,)) takes the
                                                    blocks over and goes on behind the prompt

The decode leg is an ordinary resumed request. If not all of the prompt has landed it waits, outside
of the queue, for the rest; when that is given up (or something that came was wrong), it computes
what is missing like any other: a hand-over that fails costs time, never a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from fabric.core.configs import EngineConfig
from fabric.core.engine.plan import BlockCopy, CopyKind, KvExport
from fabric.core.engine.scheduler import Scheduler
from fabric.core.engine.sequence import Group, Sequence
from fabric.core.prefix import chain_all, root
from fabric.core.request import Request

# The part of the blocks that prompts on their way may hold: 1 / RESERVED_PART.
RESERVED_PART = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KvArrival:
    """A group of blocks that lies in the staging slots [slot, ...) of every worker here.

    The other fields are those of the `KvExport` that it began as, told by its header.
    """

    request_id: str
    epoch: int
    first: int
    end: int
    slot: int
    salt: bytes
    digest: bytes


def arrival_of(export: KvExport, request_id: str, slot: int) -> KvArrival:
    """An export that has come whole, for a request that waits for it, in slots from `slot` on."""
    return KvArrival(
        request_id=request_id,
        epoch=export.epoch,
        first=export.first,
        end=export.end,
        slot=slot,
        salt=export.salt,
        digest=export.digest,
    )


class Landing(StrEnum):
    """What has become of an arrival. The staging slots of all but LANDED are to be cleared."""

    LANDED = "landed"
    UNKNOWN = "unknown"  # nobody waits for it (any more)
    DUPLICATE = "duplicate"  # these positions have landed already
    EPOCH = "epoch"  # of an earlier attempt
    RANGE = "range"  # not a run of whole blocks of this prompt
    PREFIX = "prefix"  # another prompt's, another model version's, another adapter's or tenant's


# After these the rest is not waited for: who sent this may send more of it.
WRONG = frozenset({Landing.RANGE, Landing.PREFIX})


class Expected:
    """One prompt on its way here: its blocks, what has landed in them, who waits for it."""

    __slots__ = (
        "blocks",
        "borrowed",
        "digests",
        "epoch",
        "follower",
        "host_blocks",
        "landed",
        "length",
        "named_by",
        "published",
        "salt",
    )

    def __init__(
        self, salt: bytes, digests: tuple[bytes, ...], length: int, epoch: int, blocks: list[int]
    ) -> None:
        self.length = length
        self.epoch = epoch
        self.salt = salt
        self.digests = digests  # up to the end of each block
        self.blocks = blocks
        self.host_blocks: list[int] = []
        self.landed = [False] * len(blocks)
        self.published = 0  # leading blocks that others may find
        self.named_by = -1  # the latest plan with a copy into its blocks
        self.follower: Sequence | None = None
        self.borrowed = False  # whoever follows finds it in the prefix cache: see `borrowing`

    @property
    def complete(self) -> bool:
        """All of the prompt is here."""
        return all(self.landed)


class Holder(Protocol):
    """Who has blocks."""

    blocks: list[int]
    host_blocks: list[int]


# Who is gone while a plan still names its blocks: plan id -> holders.
Leaving = dict[int, list[Holder]]


class Handovers:
    """What `Engine` has under way with other engines. `leaving` gets blocks that a plan names."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        leaving: Leaving,
    ) -> None:
        self._config = config
        self._scheduler = scheduler
        self._leaving = leaving
        self.expected: dict[str, Expected] = {}
        self.exports: dict[str, tuple[int, int]] = {}  # (epoch, tokens that have left)
        self._next_slot = 0

    # -- what leaves -----------------------------------------------------------------------------

    def export(self, group: Group, epoch: int) -> None:
        """The prompt's KV is to leave as it is computed. Raises `ValueError` where it can't."""
        if group.request.sampling.n != 1:
            raise ValueError("a prompt of several choices is not handed over")
        self.exports[group.request.request_id] = (epoch, 0)

    def advanced(self, sequence: Sequence, plan_id: int) -> None:
        """More of a sequence is computed: its new final blocks leave with plan `plan_id`."""
        name = sequence.group.request.request_id
        if name not in self.exports or sequence.finish is not None:
            return
        size, length = self._config.block_size, sequence.prompt_length
        epoch, first = self.exports[name]
        end = length if sequence.computed >= length else sequence.computed // size * size
        if end <= first or (end < length and end - first < self._config.group_tokens):
            return
        last = -(-end // size)
        blocks = sequence.blocks[first // size : last]
        slot = self.take_slots(len(blocks))
        salt = sequence.group.root
        hasher = self._scheduler.hasher
        digests = [salt, *sequence.chain_of(end // size, size, hasher)]
        digests += chain_all(digests[-1], sequence.tokens[end // size * size : end], size, hasher)
        copies = [
            BlockCopy(kind=CopyKind.EXPORT, source=block, target=slot + index)
            for index, block in enumerate(blocks)
        ]
        record = KvExport(
            request_id=name,
            epoch=epoch,
            first=first,
            end=end,
            last=end == length,
            slot=slot,
            blocks=len(blocks),
            salt=salt,
            digest=digests[-1],
        )
        self._scheduler.hand_over(copies, record)
        sequence.named_by = plan_id
        self.exports[name] = (epoch, end)

    def take_slots(self, count: int) -> int:
        """The first of so many staging slots that nobody has used."""
        slot, self._next_slot = self._next_slot, self._next_slot + count
        return slot

    def stop_export(self, name: str) -> None:
        """The request has ended."""
        self.exports.pop(name, None)

    # -- what comes ------------------------------------------------------------------------------

    def reserve(self, request: Request, epoch: int) -> bool:
        """Blocks for a prompt that will come; an earlier attempt is given up. False: no room."""
        self.drop(request.request_id)
        pool, size = self._scheduler.pool, self._config.block_size
        needed = -(-len(request.prompt) // size)
        held = sum(len(one.blocks) for one in self.expected.values())
        spare = pool.free - len(self._scheduler.running)  # those who run need a block each
        if needed > spare or held + needed > pool.num_blocks // RESERVED_PART:
            return False
        blocks = pool.allocate(needed)
        assert blocks is not None, "there was room"
        salt = root(request.model_version, request.adapter, request.tenant)
        digests = chain_all(salt, request.prompt, size, self._scheduler.hasher)
        expected = Expected(salt, digests, len(request.prompt), epoch, blocks)
        self.expected[request.request_id] = expected
        return True

    def landed(self, arrival: KvArrival, plan_id: int) -> Landing:
        """A group has come: with plan `plan_id` it is copied into the blocks that wait for it."""
        expected = self.expected.get(arrival.request_id)
        if expected is None:
            return Landing.UNKNOWN
        if arrival.epoch != expected.epoch:
            return Landing.EPOCH
        verdict = self._verdict(expected, arrival)
        if verdict is not Landing.LANDED:
            if verdict in WRONG:
                self.drop(arrival.request_id)
            return verdict
        size = self._config.block_size
        begin, last = arrival.first // size, -(-arrival.end // size)
        self._scheduler.hand_over(
            [
                BlockCopy(
                    kind=CopyKind.IMPORT,
                    source=arrival.slot + index - begin,
                    target=expected.blocks[index],
                )
                for index in range(begin, last)
            ]
        )
        expected.named_by = plan_id
        for index in range(begin, last):
            expected.landed[index] = True
        if self._config.prefix_cache:
            self._publish(expected)
        if expected.complete and expected.borrowed:
            self.drop(arrival.request_id)
        elif expected.complete and expected.follower is not None:
            self._let_go(arrival.request_id, expected)
        return Landing.LANDED

    def claim(self, sequence: Sequence) -> bool:
        """The decode leg has come. False: it goes its own way. True: it has taken the blocks over
        and may queue, or it is parked until they are complete (and then queues by itself)."""
        name = sequence.group.request.request_id
        expected = self.expected.get(name)
        if expected is None:
            return False
        request = sequence.group.request
        whole = request.sampling.n == 1 and request.sampling.prompt_logprobs is None
        resumed = len(sequence.tokens) > sequence.prompt_length
        size, hasher = self._config.block_size, self._scheduler.hasher
        digests = chain_all(sequence.group.root, request.prompt, size, hasher)
        if not whole or not resumed or digests != expected.digests:
            self.drop(name)
            return False
        expected.follower = sequence
        if expected.complete:
            self._let_go(name, expected)
        return True

    def drop(self, name: str) -> bool:
        """What has not landed yet will not. Its follower computes what is missing. False: nothing
        was expected."""
        expected = self.expected.pop(name, None)
        if expected is None:
            return False
        if expected.named_by > -1:  # the plan may have committed by now; one more does no harm
            self._leaving.setdefault(expected.named_by, []).append(expected)
        else:
            self._scheduler.pool.release(expected.blocks)
        if expected.follower is not None:
            self._scheduler.waiting.add(expected.follower)
        return True

    def stand_back(self) -> bool:
        """Nobody can go on and nothing is in flight: the newest prompt on its way, or the last one
        that waits with all its KV, gives its room up. False: nothing is held."""
        scheduler = self._scheduler
        if not (scheduler.running.items or scheduler.waiting.items):
            return False
        if self.expected:
            self.drop(next(reversed(self.expected)))
            return True
        for sequence in reversed(scheduler.waiting.items):
            if sequence.landed:
                scheduler.pool.release(sequence.landed)
                sequence.landed = []
                return True
        return False

    def committed(self, plan_id: int) -> None:
        """Plan `plan_id` names blocks no longer."""
        for expected in self.expected.values():
            if expected.named_by <= plan_id:
                expected.named_by = -1

    def parked(self) -> list[Sequence]:
        """Decode legs that wait for their KV."""
        return [one.follower for one in self.expected.values() if one.follower is not None]

    def check(self) -> None:
        """Nobody waits for what is here, and what others may find has landed."""
        for expected in self.expected.values():
            assert len(expected.blocks) == len(expected.digests) == len(expected.landed)
            assert not (expected.complete and expected.follower), "all is here, and it waits"
            assert all(expected.landed[: expected.published]), "published, not landed"

    def _verdict(self, expected: Expected, arrival: KvArrival) -> Landing:
        size, length = self._config.block_size, expected.length
        first, end = arrival.first, arrival.end
        ends_well = end == length or end % size == 0
        if not (0 <= first < end <= length and first % size == 0 and ends_well):
            return Landing.RANGE
        last = -(-end // size)
        if arrival.salt != expected.salt or arrival.digest != expected.digests[last - 1]:
            return Landing.PREFIX
        if any(expected.landed[first // size : last]):
            return Landing.DUPLICATE
        return Landing.LANDED

    def _publish(self, expected: Expected) -> None:
        """Leading full blocks that are here: others may use them too, after this plan's copies."""
        full = expected.length // self._config.block_size
        while expected.published < full and expected.landed[expected.published]:
            index = expected.published
            self._scheduler.pool.publish(expected.blocks[index], expected.digests[index])
            expected.published += 1

    def _let_go(self, name: str, expected: Expected) -> None:
        """The follower holds the blocks now, and queues."""
        del self.expected[name]
        sequence = expected.follower
        assert sequence is not None
        sequence.landed = expected.blocks
        sequence.named_by = max(sequence.named_by, expected.named_by)
        self._scheduler.waiting.add(sequence)
