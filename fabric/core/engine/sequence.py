"""One sequence (a choice of a request) and the group of a request's choices.

Mutable and slotted: these are touched for every token. They never leave the engine.
"""

from __future__ import annotations

from fabric.core.configs import EngineConfig
from fabric.core.engine.pace import STALL_TARGETS
from fabric.core.engine.plan import SequenceStart
from fabric.core.engine.standing import Standing
from fabric.core.prefix import Hasher, root
from fabric.core.request import Finish, Request, TokenLogprobs


class Sequence:
    """What one choice has, and how far its KV reaches.

        0 .............. computed ............. len(tokens)
        | KV in `blocks` | to catch up with     |

    Where it is:  new or to be recomputed   waiting, no blocks
                  swapped                   waiting, `host_blocks`
                  handed over               waiting, `landed` blocks hold the prompt's KV
                  running                   `blocks`; `in_flight` while a plan holds a step of it
    """

    __slots__ = (
        "blocks",
        "choice",
        "computed",
        "digests",
        "epoch",
        "finish",
        "group",
        "host_blocks",
        "in_flight",
        "key",
        "landed",
        "limit",
        "min_tokens",
        "named_by",
        "number",
        "of_class",
        "prompt_length",
        "published",
        "reported",
        "running",
        "sent",
        "standing",
        "started",
        "stood_at",
        "stood_since",
        "stop_tokens",
        "token_due",
        "tokens",
    )

    def __init__(self, group: Group, choice: int, number: int, config: EngineConfig) -> None:
        request = group.request
        sampling = request.sampling
        generated = request.generated[choice] if choice < len(request.generated) else ()
        self.group = group
        self.choice = choice
        self.number = number
        self.standing = group.standing
        self.of_class = self.standing.of_class
        self.key = (*self.of_class, self.standing.due, number)
        self.tokens = [*request.prompt, *generated]
        self.prompt_length = len(request.prompt)
        self.limit = min(self.prompt_length + sampling.max_tokens, config.context_limit)
        self.min_tokens = sampling.min_tokens
        eos = () if sampling.ignore_eos else config.eos_token_ids
        self.stop_tokens = frozenset((*eos, *sampling.stop_token_ids))
        self.computed = 0
        self.blocks: list[int] = []
        self.host_blocks: list[int] = []
        self.landed: list[int] = []
        self.digests: list[bytes] = []  # hash chain of the leading full blocks, as far as known
        self.published = 0  # leading blocks that need no publishing (any more)
        self.epoch = 0
        self.started = False  # the worker has the full record of this epoch
        self.sent = 0  # tokens that the worker knows
        self.running = False
        self.in_flight = False
        self.named_by = -1  # the latest plan with a step or a copy of it
        self.reported = bool(generated)  # its first chunk has gone out, here or elsewhere
        self.finish: Finish | None = None
        self.token_due: int | None = None  # ns: later than this and its mean TPOT misses the target
        self.stood_at = -1  # `computed` when it was last seen to move (see `Aging`) ...
        self.stood_since: int | None = None  # ... and when that was, ns

    def may_preempt(self, other: Sequence, now: int) -> bool:
        """It is of a strictly better class and must not wait: of a better priority it never must,
        of a better tier only from a certain instant on."""
        if self.of_class >= other.of_class:
            return False
        return self.of_class[0] < other.of_class[0] or now >= self.standing.preempts_from

    def note_token(self, now: int) -> None:
        """It has a new token: the next one is due a target's time later, counted from the first.

        What it is ahead is kept, but for `STALL_TARGETS` at most."""
        tpot_ns = self.standing.tpot_ns
        if self.token_due is None:
            self.token_due = now + tpot_ns
        else:
            self.token_due = min(self.token_due, now + (STALL_TARGETS - 1) * tpot_ns) + tpot_ns

    def ended_by(self) -> Finish | None:
        """Why the last token ends this choice, if it does. Stop tokens count after `min_tokens`."""
        outputs = len(self.tokens) - self.prompt_length
        if outputs > self.min_tokens and self.tokens[-1] in self.stop_tokens:
            return Finish.STOP
        return Finish.LENGTH if len(self.tokens) >= self.limit else None

    def expected_left(self) -> int:
        """How many tokens may still come: what was expected; of one that lasts longer, half of what
        it has so far."""
        outputs = len(self.tokens) - self.prompt_length
        expected = self.group.request.expected_tokens
        left = self.limit - len(self.tokens)
        return left if expected is None else min(left, max(expected - outputs, outputs // 2 + 1))

    def record(self, now: int) -> SequenceStart:
        """All that a worker must know of it; from now on the worker does."""
        self.started = True
        self.sent = len(self.tokens)
        request = self.group.request
        if self.group.begun is None:
            self.group.begun = now
        return SequenceStart(
            sequence=self.number,
            epoch=self.epoch,
            choice=self.choice,
            tokens=tuple(self.tokens),
            prompt_length=self.prompt_length,
            blocks=tuple(self.blocks),
            sampling=request.sampling,
            adapter=request.adapter,
        )

    def chain_of(self, count: int, block_size: int, hasher: Hasher) -> list[bytes]:
        """Hashes of the first `count` blocks, which must be full. Each is computed once."""
        digests = self.digests
        while len(digests) < count:
            begin = len(digests) * block_size
            parent = digests[-1] if digests else self.group.root
            digests.append(hasher.chain(parent, self.tokens[begin : begin + block_size]))
        return digests[:count]

    def check(self, block_size: int) -> None:
        """Its own numbers fit together."""
        covered = len(self.blocks) + len(self.host_blocks)
        assert not (self.blocks and self.host_blocks), "blocks on one side only"
        assert not (self.landed and (self.running or self.host_blocks)), "landed, not taken over"
        assert self.computed < len(self.tokens), "something is always left to compute"
        if not self.in_flight:
            assert covered == -(-self.computed // block_size), "blocks cover what is computed"
        assert self.published <= max(self.computed // block_size, 0), "published blocks are full"
        assert self.started or not self.in_flight, "a step needs a record"
        assert self.ended_by() is None or self.finish is not None, "an ended choice goes on"


class Group:
    """All choices of one request. `primary` computes the prompt, then the `unborn` fork from it."""

    __slots__ = (
        "begun",
        "cached_tokens",
        "live",
        "primary",
        "prompt_logprobs",
        "request",
        "root",
        "standing",
        "unborn",
    )

    def __init__(self, request: Request, standing: Standing) -> None:
        self.request = request
        self.standing = standing
        self.root = root(request.model_version, request.adapter, request.tenant)
        self.primary = 0
        self.live: dict[int, Sequence] = {}
        self.unborn: dict[int, Sequence] = {}
        self.cached_tokens: int | None = None
        self.begun: int | None = None  # ns: when its first step was planned
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]

    def next_primary(self) -> Sequence:
        """The first unborn choice takes over computing the prompt (it is born now)."""
        choice = next(iter(self.unborn))
        sequence = self.unborn.pop(choice)
        self.primary = choice
        self.live[choice] = sequence
        return sequence

    def note_prompt_logprobs(self, start: int, found: tuple[TokenLogprobs, ...]) -> None:
        """Logprobs of prompt positions start+1, ...; known ones come again when recomputed."""
        known = len(self.prompt_logprobs) - (start + 1)
        assert known >= 0, "a gap in the prompt's logprobs"
        self.prompt_logprobs.extend(found[known:])
