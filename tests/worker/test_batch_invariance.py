"""Greedy tokens of a request depend on the request alone: not on its batch, its chunks, its past.

32 prompts of the demo model on the C++ executor. A single logit bit that depended on the batch
would show: over 320 greedy tokens, near ties between the first two candidates are common.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from kit.local_engine import ALWAYS_SWAP, LocalEngine, Output, ask

from fabric.core.engine.plan import CopyKind
from fabric.core.request import Request
from fabric.worker.worker import Worker

PROMPTS = 32
SCARCE = {"prefix_cache": False, "num_blocks": 40, "context_limit": 512}
EVERY_OTHER = slice(None, None, 2)  # still of every fill of a block
Tokens = dict[str, list[int]]


def requests() -> list[Request]:
    """Lengths from 3 to 76 tokens, so that every fill of a block occurs."""
    draw = random.Random(2)
    prompts = [
        [draw.randrange(20, 49_000) for _ in range(3 + 73 * i // 31)] for i in range(PROMPTS)
    ]
    return [ask(f"r{i}", prompt) for i, prompt in enumerate(prompts)]


def tokens_of(outputs: dict[tuple[str, int], Output]) -> Tokens:
    return {request_id: output.tokens for (request_id, _), output in outputs.items()}


@pytest.fixture(scope="module")
def alone(demo_worker: Worker) -> Tokens:
    """Each request in an engine that it has for itself."""
    engine = LocalEngine(demo_worker, prefix_cache=False)
    tokens: Tokens = {}
    for request in requests():
        tokens |= tokens_of(engine.run(request))
    assert len({tuple(t) for t in tokens.values()}) > PROMPTS // 2, "the prompts make a difference"
    return tokens


@pytest.mark.parametrize("size", [7, 32])
def test_in_batches(demo_worker: Worker, alone: Tokens, size: int) -> None:
    engine = LocalEngine(demo_worker, prefix_cache=False, max_sequences=size)
    assert tokens_of(engine.run(*requests())) == alone
    assert max(len(plan.steps) for plan in engine.plans) == size


def test_with_chunked_prefill(demo_worker: Worker, alone: Tokens) -> None:
    engine = LocalEngine(demo_worker, prefix_cache=False, chunk_tokens=13, step_tokens=40)
    assert tokens_of(engine.run(*requests())) == alone
    mixed = [plan for plan in engine.plans if {1, 13} <= {step.count for step in plan.steps}]
    assert mixed, "some steps decode one sequence and prefill a chunk of another"


def every_other(alone: Tokens) -> Tokens:
    """What `alone` has for `requests()[EVERY_OTHER]`."""
    return {request.request_id: alone[request.request_id] for request in requests()[EVERY_OTHER]}


def run_with_an_intruder(engine: LocalEngine) -> Tokens:
    """Requests; once they decode, an urgent one comes that needs most of the pool."""
    engine.begin(*requests()[EVERY_OTHER])
    for _ in range(6):
        engine.step()
    engine.begin(ask("intruder", list(range(1000, 1480)), priority=-1))
    tokens = tokens_of(engine.finish())
    assert len(tokens.pop("intruder")) == 10
    return tokens


def test_preempted_by_swap(demo_worker: Worker, alone: Tokens) -> None:
    engine = LocalEngine(
        demo_worker,
        **SCARCE,
        num_host_blocks=200,
        preemption=ALWAYS_SWAP,
    )
    assert run_with_an_intruder(engine) == every_other(alone)
    assert engine.copies(CopyKind.SWAP_OUT) > 10
    assert engine.copies(CopyKind.SWAP_IN) == engine.copies(CopyKind.SWAP_OUT)


def test_preempted_by_recompute(demo_worker: Worker, alone: Tokens) -> None:
    engine = LocalEngine(demo_worker, **SCARCE, num_host_blocks=0)
    assert run_with_an_intruder(engine) == every_other(alone)
    assert engine.engine.snapshot("local", 0).preemptions_total > 5
    assert engine.copies(CopyKind.SWAP_OUT) == 0


def test_preempted_by_a_better_tier(demo_worker: Worker, alone: Tokens) -> None:
    """Batch work gives up places, stands still, is swapped and cut into small chunks, while
    interactive requests come and go."""
    engine = LocalEngine(demo_worker, max_sequences=4, num_host_blocks=256, preemption=ALWAYS_SWAP)
    engine.step_ns = 60_000_000
    batch = [replace(one, tier="batch") for one in requests()]
    engine.begin(*batch)
    for number in range(12):
        engine.step()
        urgent = ask(f"urgent {number}", list(range(2000 + number, 2090 + number)), max_tokens=4)
        engine.begin(replace(urgent, tier="interactive", arrival=engine.now))
    tokens = tokens_of(engine.finish())
    assert {key: t for key, t in tokens.items() if not key.startswith("urgent")} == alone
    snapshot = engine.engine.snapshot("local", 0)
    assert snapshot.preemptions_total > 3 and snapshot.dropped_tokens_total == 0
    assert engine.copies(CopyKind.SWAP_IN) == engine.copies(CopyKind.SWAP_OUT) > 3
    still = [plan for plan in engine.plans if len(plan.steps) < 3]
    assert still, "batch rows stood still beside an urgent prompt"


def test_after_prefix_cache_hits(demo_worker: Worker, alone: Tokens) -> None:
    engine = LocalEngine(demo_worker)
    some = requests()[EVERY_OTHER]
    engine.run(*some)
    again = engine.run(*some)
    assert tokens_of(again) == every_other(alone)
    assert sum((output.cached_tokens or 0) >= 16 for output in again.values()) > len(some) // 2


def test_sampled_tokens_in_any_batch(demo_worker: Worker) -> None:
    """Same seed, same prompt: the noise belongs to (seed, choice, position)."""
    drawn = {
        "plain": {"temperature": 1.0},
        "top_p": {"temperature": 0.8, "top_p": 0.9},
        "top_k": {"temperature": 1.3, "top_k": 20},
        "min_p": {"temperature": 1.1, "min_p": 0.05, "presence_penalty": 0.5},
    }
    prompts = [list(request.prompt) for request in requests()[::4]]
    asked = [
        ask(f"{name} {i}", prompt, seed=i, logprobs=2, **sampling)
        for i, prompt in enumerate(prompts)
        for name, sampling in drawn.items()
    ]
    engine = LocalEngine(demo_worker)
    together = engine.run(*asked)
    apart = {}
    for request in asked[::3]:
        apart |= engine.run(request)
    for key, output in apart.items():
        assert output.tokens == together[key].tokens
        assert output.logprobs == together[key].logprobs
    assert len({tuple(output.tokens) for output in together.values()}) > 3 * len(asked) // 4
