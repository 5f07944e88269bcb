"""A worker in pure Python: executes step plans on a toy KV memory and notices every wrong block.

Each KV slot holds a fingerprint of all tokens up to its position, so a wrong copy, a missing
copy-on-write or a block that was handed out too early shows up as somebody else's history. The next
token is a function of (history, seed, choice) alone, so two runs that schedule differently must
still produce the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from fabric.core.configs import EngineConfig
from fabric.core.engine.plan import (
    BlockCopy,
    CopyKind,
    Previous,
    Sample,
    SequenceStart,
    SequenceStep,
    StepPlan,
    StepResult,
)
from fabric.core.request import SamplingParams, TokenLogprobs

MASK = (1 << 64) - 1


@dataclass(slots=True, kw_only=True)
class Known:
    """What the worker keeps of one sequence."""

    start: SequenceStart
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    fingerprints: list[int] = field(default_factory=list)


# (history, prompt length, sampling, choice) -> next token
Script = Callable[[Sequence[int], int, SamplingParams, int], int]


def pseudo_random(vocab: int, eos_token_ids: tuple[int, ...] = ()) -> Script:
    """The default script: a hash of history, seed and choice; no stop token before min_tokens."""

    def next_token(
        history: Sequence[int], prompt_length: int, sampling: SamplingParams, choice: int
    ) -> int:
        text = f"{sampling.seed}/{choice}/{list(history)}"
        token = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") % vocab
        if len(history) - prompt_length < sampling.min_tokens:
            stops = {*eos_token_ids, *sampling.stop_token_ids}
            while token in stops:
                token = (token + 1) % vocab
        return token

    return next_token


class ScriptedWorker:
    """`execute(plan) -> StepResult`. Every broken promise of a plan is an AssertionError."""

    def __init__(
        self, config: EngineConfig, *, vocab: int = 50, script: Script | None = None
    ) -> None:
        self.config = config
        self.vocab = vocab
        self.script = script or pseudo_random(vocab, config.eos_token_ids)
        size = config.block_size
        self.device = [[0] * size for _ in range(config.num_blocks)]
        self.host = [[0] * size for _ in range(config.num_host_blocks)]
        self.staging: dict[int, list[int]] = {}  # slots of blocks between two replicas
        self.dropped: set[int] = set()  # slots to come that nobody will collect
        self.known: dict[int, Known] = {}
        self._last_plan = -1

    def execute(self, plan: StepPlan) -> StepResult:
        """Drops, copies in order, starts, then all steps: first every write, then every read."""
        assert plan.plan_id > self._last_plan, "plans run in order"
        self._last_plan = plan.plan_id
        assert sum(step.count for step in plan.steps) <= self.config.step_tokens, "over the budget"
        for number in plan.drops:
            del self.known[number]
        for copy in plan.copies:
            self._copy(copy)
        for start in plan.starts:
            self._start(start)
        assert len(self.known) <= self.config.max_sequences, "more sequences than rows"
        rows = [self._apply(step) for step in plan.steps]
        written: set[int] = set()
        for known, step in zip(rows, plan.steps, strict=True):
            self._write(known, step, written)
        samples = [self._sample(known, step) for known, step in zip(rows, plan.steps, strict=True)]
        return StepResult(plan_id=plan.plan_id, samples=tuple(samples))

    def _copy(self, copy: BlockCopy) -> None:
        if copy.kind is CopyKind.EXPORT:
            assert copy.target not in self.staging, "a slot is used once"
            self.staging[copy.target] = list(self.device[copy.source])
            if copy.target in self.dropped:
                self.dropped.discard(copy.target)
                self.staging.pop(copy.target, None)
            return
        if copy.kind is CopyKind.IMPORT:
            self.device[copy.target] = self.staging.pop(copy.source)
            return
        source = self.host if copy.kind is CopyKind.SWAP_IN else self.device
        target = self.host if copy.kind is CopyKind.SWAP_OUT else self.device
        target[copy.target] = list(source[copy.source])

    def _start(self, start: SequenceStart) -> None:
        before = self.known.get(start.sequence)
        assert before is None or before.start.epoch < start.epoch, "an old epoch"
        known = Known(start=start, blocks=list(start.blocks))
        self.known[start.sequence] = known
        self._append(known, start.tokens)

    def _append(self, known: Known, tokens: Sequence[int | Previous]) -> None:
        for token in tokens:
            assert not isinstance(token, Previous), "unknown tokens are not scripted"
            last = known.fingerprints[-1] if known.fingerprints else self._salt(known.start)
            known.tokens.append(token)
            known.fingerprints.append((last * 6364136223846793005 + token + 1) & MASK)

    def _salt(self, start: SequenceStart) -> int:
        return int.from_bytes(
            blake2b(repr(start.adapter).encode(), digest_size=7).digest(), "little"
        )

    def _apply(self, step: SequenceStep) -> Known:
        known = self.known[step.sequence]
        assert known.start.epoch == step.epoch, "a step of another epoch"
        self._append(known, step.tokens)
        known.blocks.extend(step.blocks)
        if step.replace is not None:
            index, block = step.replace
            known.blocks[index] = block
        end = step.start + step.count
        assert step.count > 0 and end <= len(known.tokens), "tokens that nobody has"
        assert step.samples == (end == len(known.tokens)), "samples iff the end is reached"
        assert end <= len(known.blocks) * self.config.block_size, "no block to write to"
        return known

    def _write(self, known: Known, step: SequenceStep, written: set[int]) -> None:
        size = self.config.block_size
        for position in range(step.start, step.start + step.count):
            block = known.blocks[position // size]
            slot = block * size + position % size
            assert slot not in written, "two sequences write one slot in one step"
            written.add(slot)
            self.device[block][position % size] = known.fingerprints[position]

    def _sample(self, known: Known, step: SequenceStep) -> Sample:
        size = self.config.block_size
        for position in range(step.start + step.count):
            found = self.device[known.blocks[position // size]][position % size]
            assert found == known.fingerprints[position], (
                f"sequence {step.sequence}: position {position} holds another history"
            )
        start, sampling = known.start, known.start.sampling
        found_logprobs: tuple[TokenLogprobs, ...] = ()
        if sampling.prompt_logprobs is not None:
            last = min(step.start + step.count, start.prompt_length - 1)
            positions = range(step.start + 1, last + 1)
            found_logprobs = tuple(
                self._logprobs(known.tokens[p], sampling.prompt_logprobs) for p in positions
            )
        if not step.samples:
            return Sample(token=None, prompt_logprobs=found_logprobs)
        token = self.script(known.tokens, start.prompt_length, sampling, start.choice)
        logprobs = None if sampling.logprobs is None else self._logprobs(token, sampling.logprobs)
        return Sample(token=token, logprobs=logprobs, prompt_logprobs=found_logprobs)

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        others = tuple(((token + i) % self.vocab, -1.0 - i) for i in range(count))
        return TokenLogprobs(token=token, logprob=-1.0, rank=1, top=others)
