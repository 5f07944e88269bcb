"""`LocalEngine`: a real engine over a real worker, in the process, with its books checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fabric.core.configs import EngineConfig, PreemptionCosts
from fabric.core.engine.engine import Accepted, Engine
from fabric.core.engine.plan import CopyKind, StepPlan
from fabric.core.request import Finish, Request, SamplingParams, TokenChunk, TokenLogprobs
from fabric.worker.worker import Worker

ALWAYS_SWAP = PreemptionCosts(swap_ns_per_block=1, recompute_ns_per_token=1_000_000)


@dataclass(slots=True, kw_only=True)
class Output:
    """All that came of one choice. `begin`: how many tokens a resumed one had before."""

    begin: int | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish: Finish | None = None
    cached_tokens: int | None = None


class LocalEngine:
    """`worker`'s pools are made anew. `plans` keeps every plan that ran."""

    def __init__(self, worker: Worker, **settings: Any) -> None:
        settings = {"num_blocks": 256, "context_limit": 256, "max_sequences": 32} | settings
        self.worker = worker
        self.config = EngineConfig(eos_token_ids=worker.config.eos_token_ids, **settings)
        worker.allocate(
            num_blocks=self.config.num_blocks,
            num_host_blocks=self.config.num_host_blocks,
            block_size=self.config.block_size,
            max_sequences=self.config.max_sequences,
            context_limit=self.config.context_limit,
        )
        self.engine = Engine(self.config)
        self.plans: list[StepPlan] = []
        self.now = 0
        self.step_ns = 0  # what each step is said to take
        self._outputs: dict[tuple[str, int], Output] = {}

    def run(self, *requests: Request) -> dict[tuple[str, int], Output]:
        """To the end of all of them."""
        self.begin(*requests)
        return self.finish()

    def begin(self, *requests: Request) -> None:
        """Queue them."""
        for request in requests:
            outcome = self.engine.add(request, self.now)
            assert isinstance(outcome, Accepted), outcome

    def step(self) -> None:
        """One turn; the accounts are checked after it."""
        plan = self.engine.schedule(self.now)
        assert plan is not None, "it has work and nothing is in flight"
        self.plans.append(plan)
        result = self.worker.execute(plan)
        self.now += self.step_ns
        for chunk in self.engine.commit(plan, result, self.now):
            _add(self._outputs.setdefault((chunk.request_id, chunk.choice), Output()), chunk)
        self.engine.check()

    def finish(self) -> dict[tuple[str, int], Output]:
        """Step until nothing is left; all outputs since the last time, by (request, choice)."""
        while self.engine.has_work:
            self.step()
        snapshot = self.engine.snapshot("local", 0)
        assert snapshot.blocks_free == snapshot.blocks_total
        assert snapshot.host_blocks_free == snapshot.host_blocks_total
        outputs, self._outputs = self._outputs, {}
        return outputs

    def copies(self, kind: CopyKind) -> int:
        """How many blocks were copied that way."""
        return sum(copy.kind is kind for plan in self.plans for copy in plan.copies)


def ask(request_id: str, prompt: list[int], *, priority: int = 0, **sampling: Any) -> Request:
    """A request: greedy, 10 tokens, never ending early, unless `sampling` says otherwise."""
    settings = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True} | sampling
    return Request(
        request_id=request_id,
        prompt=tuple(prompt),
        sampling=SamplingParams(**settings),
        arrival=0,
        priority=priority,
    )


def _add(output: Output, chunk: TokenChunk) -> None:
    if output.begin is None:
        output.begin = chunk.position
    assert chunk.position == output.begin + len(output.tokens)
    output.tokens += chunk.tokens
    output.logprobs += chunk.logprobs or ()
    output.finish = chunk.finish
    if chunk.prompt_logprobs is not None:
        output.prompt_logprobs = chunk.prompt_logprobs
    if chunk.cached_tokens is not None:
        output.cached_tokens = chunk.cached_tokens
