"""Prefixes that engines lend each other: a prompt's beginning is fetched where another one has it.

    borrower                                         holder
    borrow(request): blocks for what is missing
    here; it waits outside of the queue
      └──KvWish──────────────────────────────> lend(wish): its blocks leave with the next plan
    landed(arrival) <── KvArrival ... KvExport ──┘

It is the receiving end of a hand-over (`handover.Handovers`) with two differences: what has landed
is only ever found through the prefix cache, and the request may go on at any time without the rest.
So there is one end for a loan that is complete, one that failed and one that took too long: the
blocks are let go of, and the request queues like any other and finds what has come.
"""

from __future__ import annotations

from dataclasses import dataclass

from fabric.core.configs import EngineConfig
from fabric.core.engine.handover import RESERVED_PART, Expected, Handovers
from fabric.core.engine.plan import BlockCopy, CopyKind, KvExport
from fabric.core.engine.scheduler import Scheduler
from fabric.core.engine.sequence import Sequence

# What a loan says in place of a request: it is the same for all who borrow it, and its hash says it
# all.
LOAN = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvWish:
    """Full blocks from position `first` on: their chained hashes, which begin at `salt`."""

    first: int
    salt: bytes
    digests: tuple[bytes, ...]


class Borrowing:
    """Both ends of an engine's loans."""

    def __init__(self, config: EngineConfig, scheduler: Scheduler, handovers: Handovers) -> None:
        self._config = config
        self._scheduler = scheduler
        self._handovers = handovers

    def borrow(self, sequence: Sequence, tokens: int) -> KvWish | None:
        """Park a sequence that waits with nothing yet, until `tokens` of its prompt have landed.
        None: it goes on by itself, because that is here, or there is no room for it."""
        scheduler, size = self._scheduler, self._config.block_size
        name = sequence.group.request.request_id
        wants_all = sequence.group.request.sampling.prompt_logprobs is not None
        fresh = not (sequence.running or sequence.host_blocks or sequence.landed)
        fresh = fresh and name not in self._handovers.expected
        if not fresh or wants_all or not self._config.prefix_cache:
            return None
        # At least the last token stays to be computed.
        count = min(tokens, sequence.prompt_length - 1) // size
        digests = tuple(sequence.chain_of(count, size, scheduler.hasher))
        pool = scheduler.pool
        found = pool.match(digests)
        if len(found) == count:
            return None
        pool.share(found)  # a gap in front of what comes would make it worthless
        needed = count - len(found)
        held = sum(len(one.blocks) for one in self._handovers.expected.values())
        spare = pool.free - len(scheduler.running)
        if needed > spare or held + count > pool.num_blocks // RESERVED_PART:
            pool.release(found)
            return None
        blocks = pool.allocate(needed)
        assert blocks is not None, "there was room"
        expected = Expected(sequence.group.root, digests, count * size, 0, [*found, *blocks])
        expected.landed[: len(found)] = [True] * len(found)
        expected.published = len(found)
        expected.borrowed = True
        expected.follower = sequence
        scheduler.waiting.remove(sequence)
        self._handovers.expected[name] = expected
        return KvWish(
            first=len(found) * size, salt=sequence.group.root, digests=digests[len(found) :]
        )

    def lend(self, wish: KvWish) -> KvExport | None:
        """The next plan copies all that is wished for into slots. None: it is not all here."""
        pool = self._scheduler.pool
        blocks = pool.match(wish.digests)
        if not blocks or len(blocks) < len(wish.digests):
            return None
        pool.share(blocks)
        pool.release(blocks)  # used just now; copies come first, so whoever gets them writes later
        slot = self._handovers.take_slots(len(blocks))
        self._scheduler.hand_over(
            [
                BlockCopy(kind=CopyKind.EXPORT, source=block, target=slot + index)
                for index, block in enumerate(blocks)
            ]
        )
        return KvExport(
            request_id=LOAN,
            epoch=0,
            first=wish.first,
            end=wish.first + len(blocks) * self._config.block_size,
            last=False,
            slot=slot,
            blocks=len(blocks),
            salt=wish.salt,
            digest=wish.digests[-1],
        )
