"""EXECUTES. A `Worker` holds one model and its KV pools and turns a `StepPlan` into a `StepResult`.

    plan ──> drops ──> copies ──> starts ──> steps ──> batch ──> logits ──> samples
             forget    blocks     remember   deltas    tensors   Runner     Sampler

It decides nothing, and reads no clock after its warm-up. Plain class: what places it (a Ray actor,
a driver script, a test) calls `execute` from one thread.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fabric.core.engine.plan import (
    Previous,
    Sample,
    SequenceStep,
    StepPlan,
    StepResult,
)
from fabric.core.errors import ConfigError
from fabric.core.request import TokenLogprobs
from fabric.kernels.device import choose_device, free_bytes
from fabric.kernels.sampling_kernels import create_sampling
from fabric.model.config import DecoderConfig
from fabric.model.parallel import Share
from fabric.worker.batch import BatchBuilder, SequenceState, SequenceTable, Span
from fabric.worker.kv_cache import KvCache
from fabric.worker.kv_transfer import Part, Staging
from fabric.worker.links import Links
from fabric.worker.memory import MemoryReport, PoolSizes, PoolWish, size_pools
from fabric.worker.runner import KernelBuild, Runner
from fabric.worker.sampler import Sampler, SamplingState
from fabric.worker.warm_up import SWAP_BLOCKS, WarmUpTimes, warm_up

PROMPT_SLICE = 64  # logits rows at once when a prompt's log-probabilities are asked for
PLANS_REMEMBERED = 4  # how far back an input token may point into results


class Worker:
    """One model on one device.

        worker = Worker(folder)
        sizes = worker.pool_sizes(wish)
        worker.allocate(num_blocks=sizes.num_blocks, ...)
        result = worker.execute(plan)

    `folder` holds a model that `fabric.model.source` has resolved. `dtype`: "bfloat16" or
    "float32". `device`: "auto", "cpu" or "cuda". `context_limit`: the longest sequence in tokens
    (None: what the model can do). Raises `ModelError`, and `ConfigError` if the device isn't there.

    `links`: this worker's place among those of its replica, when there are several (None: it is
    alone). Then every one of them gets every plan, and `execute` is the same step on each.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "bfloat16",
        device: str = "auto",
        context_limit: int | None = None,
        build: KernelBuild | None = None,
        links: Links | None = None,
    ) -> None:
        try:
            self._device = choose_device(device)
        except ValueError as error:
            raise ConfigError(f"model.device: {error}") from None
        build = build or KernelBuild()
        self._runner = Runner(
            folder,
            dtype=dtype,
            device=self._device,
            context_limit=context_limit,
            build=build,
            links=links,
        )
        self._sampler = Sampler(
            create_sampling(self._device, build.cache_folder, progress=build.progress)
        )
        self._links = links
        self._is_sampler = links is None or links.is_sampler
        self._batches = BatchBuilder()
        self._results: dict[int, tuple[Sample, ...]] = {}
        self._cache: KvCache | None = None
        self._sequences = SequenceTable(max_sequences=1, context_limit=1, block_size=1)
        self._context_limit = 1

    @property
    def config(self) -> DecoderConfig:
        """The model's own numbers: context limit, vocabulary, end-of-sequence tokens."""
        return self._runner.config

    @property
    def description(self) -> str:
        """Which code runs, for the log."""
        return self._runner.description

    @property
    def share(self) -> Share:
        """What of the model this worker holds."""
        return self._runner.share

    def expert_loads(self) -> tuple[int, ...]:
        """How many rows each of the model's experts got here since the start, over all layers; the
        sum over a group's workers is what was routed. Empty without experts."""
        loads_LX = self._runner.expert_loads()
        return () if loads_LX is None else tuple(loads_LX.sum(dim=0).tolist())

    def close(self) -> None:
        """Leave the group, if there is one: the others notice when they wait for this worker."""
        if self._links is not None:
            self._links.close()

    def pool_sizes(self, wish: PoolWish) -> PoolSizes:
        """How many blocks `wish` gets in this machine's free memory. Raises `ValueError`."""
        return size_pools(
            wish,
            block_bytes=self._runner.kv_layout(wish.block_size).block_bytes(),
            free_device_bytes=free_bytes(self._device),
            free_host_bytes=free_bytes(torch.device("cpu")),
            is_cpu=self._device.type == "cpu",
        )

    def allocate(
        self,
        *,
        num_blocks: int,
        num_host_blocks: int,
        block_size: int,
        max_sequences: int,
        context_limit: int,
    ) -> MemoryReport:
        """Make the pools; forgets every sequence. Old ones live on until the next step has run."""
        self._cache = KvCache(
            self._runner.kv_layout(block_size),
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            device=self._device,
            part=self._part(),
        )
        self._sequences = SequenceTable(
            max_sequences=max_sequences, context_limit=context_limit, block_size=block_size
        )
        self._context_limit = context_limit
        self._results.clear()
        return self.memory()

    @property
    def staging(self) -> Staging:
        """Blocks on their way from and to other replicas."""
        assert self._cache is not None, "allocate first"
        return self._cache.staging

    def _part(self) -> Part:
        share, config = self.share, self.config
        return Part(
            layers=(share.layers.start, share.layers.stop),
            heads=(share.kv_heads.start, share.kv_heads.stop),
            all_layers=config.layers,
            all_heads=config.kv_heads,
        )

    def memory(self) -> MemoryReport:
        """Resident bytes of weights, position tables and pools."""
        return MemoryReport(
            weight_bytes=self._runner.weight_bytes,
            rope_bytes=self._runner.rope_bytes,
            kv_pool_bytes=self._cache.device_bytes if self._cache else 0,
            host_pool_bytes=self._cache.host_bytes if self._cache else 0,
        )

    def warm_up(self) -> WarmUpTimes:
        """Run a prefill, a decode step and a few swaps in the first blocks, so that the first
        request finds warm code and buffers. Only before the first plan: the content is lost."""
        assert self._cache is not None, "allocate first"
        assert len(self._sequences) == 0
        pool, host_blocks = self._cache.pool, len(self._cache.host_XB)
        block_size, num_blocks = pool.layout.page, len(pool.blocks_XB)
        times = warm_up(
            self.execute,
            context_limit=min(self._context_limit, num_blocks * block_size),
            block_size=block_size,
            swap_blocks=min(SWAP_BLOCKS, num_blocks, host_blocks),
        )
        self._results.clear()
        return times

    @property
    def is_sampler(self) -> bool:
        """Does `execute` return results here? In a group only one worker's does."""
        return self._is_sampler

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Run one step. None on all workers of a group but the one that samples.

        Raises `CollectiveError` (and then the group is lost) if another worker of the group is gone
        or does not answer in time.
        """
        assert self._cache is not None, "allocate first"
        sequences = self._sequences
        for sequence in plan.drops:
            sequences.drop(sequence)
        self._cache.copy(plan.copies)
        if not plan.steps:
            self._cache.finish()  # nothing on the device waits for them
        for start in plan.starts:
            sequences.start(start, SamplingState(start, self.config.eos_token_ids))
        states = [sequences.advance(step, self._resolve) for step in plan.steps]
        samples = self._run(plan.steps, states)
        self._remember(plan.plan_id, samples)
        return StepResult(plan_id=plan.plan_id, samples=samples) if self._is_sampler else None

    def _run(
        self, steps: tuple[SequenceStep, ...], states: list[SequenceState]
    ) -> tuple[Sample, ...]:
        spans, prompts = [], {}
        for index, (step, state) in enumerate(zip(steps, states, strict=True)):
            start, end = step.start, step.start + step.count
            if state.sampling.params.prompt_logprobs is not None:
                told = min(end, state.prompt_length - 1)
                if start < told:
                    prompts[index] = self._rank_prompt(state, start, told)
                    start = told
            if start < end:
                spans.append(Span(state, start, end - start, int(step.samples)))
        drawn = iter(self._draw(spans))
        samples = [next(drawn) if step.samples else _NO_SAMPLE for step in steps]
        for index, logprobs in prompts.items():
            sample = samples[index]
            samples[index] = Sample(
                token=sample.token, logprobs=sample.logprobs, prompt_logprobs=tuple(logprobs)
            )
        return tuple(samples)

    def _draw(self, spans: list[Span]) -> list[Sample]:
        if not spans:
            return []
        assert self._cache is not None
        batch = self._batches.build(spans, self._sequences.blocks_XB)
        logits_RV = self._runner.run(batch, self._cache.pool)
        if logits_RV is None:
            return [_NO_SAMPLE for span in spans if span.logits]
        rows = [(span.state.sampling, span.state.tokens) for span in spans if span.logits]
        return self._sampler.sample(logits_RV, rows) if rows else []

    def _rank_prompt(self, state: SequenceState, start: int, end: int) -> list[TokenLogprobs]:
        """Run positions [start, end) in slices, so that a long prompt's logits never lie in memory
        all at once. To them it is no difference: no output depends on what shares its step."""
        assert self._cache is not None
        top = state.sampling.params.prompt_logprobs or 0
        ranked: list[TokenLogprobs] = []
        for begin in range(start, end, PROMPT_SLICE):
            count = min(PROMPT_SLICE, end - begin)
            span = Span(state, begin, count, count)
            batch = self._batches.build([span], self._sequences.blocks_XB)
            logits_RV = self._runner.run(batch, self._cache.pool)
            if logits_RV is None:
                continue
            targets = state.tokens[begin + 1 : begin + 1 + count]
            ranked += self._sampler.rank_prompt(logits_RV, targets, top)
        return ranked

    def _resolve(self, previous: Previous) -> int:
        token = self._results[previous.plan_id][previous.row].token
        assert token is not None, (
            f"row {previous.row} of plan {previous.plan_id} drew no token here (of a group's "
            "workers only one knows it)"
        )
        return token

    def _remember(self, plan_id: int, samples: tuple[Sample, ...]) -> None:
        self._results[plan_id] = samples
        if len(self._results) > PLANS_REMEMBERED:
            del self._results[next(iter(self._results))]


_NO_SAMPLE = Sample(token=None)
