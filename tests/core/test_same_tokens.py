"""A request's tokens do not depend on the pool, the budget, the others, preemption or the cache."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.engine_loop import EngineLoop, ask

from fabric.core.configs import EngineConfig, PreemptionCosts
from fabric.core.request import Finish, Request

ROOMY = EngineConfig(
    block_size=4,
    num_blocks=4000,
    max_sequences=200,
    step_tokens=10_000,
    chunk_tokens=10_000,
    prefix_cache=False,
    eos_token_ids=(7,),
)
TIGHT = replace(ROOMY, max_sequences=8, step_tokens=24, chunk_tokens=10, prefix_cache=True)
NEVER_SWAP = PreemptionCosts(swap_ns_per_block=10**12)


def crowd(count: int, seed: int) -> list[Request]:
    """Requests with shared prefixes, choices and priorities; each fits into 24 blocks of 4."""
    random = Random(seed)
    shared = [random.randrange(50) for _ in range(40)]
    requests = []
    for number in range(count):
        tail = [random.randrange(50) for _ in range(random.randrange(1, 16))]
        prompt = shared[: random.randrange(41)] + tail
        request = ask(
            f"r{number}",
            prompt,
            arrival=number,
            priority=random.choice([0, 0, 1]),
            max_tokens=random.randrange(1, 40),
            n=random.choice([1, 1, 3]),
            seed=number,
        )
        requests.append(request)
    return requests


@cache
def unconstrained() -> dict[tuple[str, int], tuple[list[int], Finish | None]]:
    """What they get where there is room for all."""
    alone = EngineLoop(ROOMY, checked=False)
    alone.add(*crowd(40, seed=1))
    alone.run()
    return alone.everything()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(
    ("config", "preempts", "swaps"),
    [
        (replace(TIGHT, num_blocks=30, num_host_blocks=40), True, True),
        (replace(TIGHT, num_blocks=30, num_host_blocks=0), True, False),
        (replace(TIGHT, num_blocks=30, num_host_blocks=40, preemption=NEVER_SWAP), True, False),
        (replace(TIGHT, num_blocks=30, num_host_blocks=40, prefix_cache=False), True, True),
        (replace(TIGHT, num_blocks=300, step_tokens=8, chunk_tokens=3), True, False),
    ],
    ids=["swap", "no host", "recompute", "no cache", "small steps"],
)
def test_same_tokens_as_unconstrained(
    config: EngineConfig, preempts: bool, swaps: bool, depth: int
) -> None:
    requests = crowd(40, seed=1)
    loop = EngineLoop(replace(config, micro_batches=depth), depth=depth)
    for request in requests:
        loop.add(request)
        loop.step()
    loop.run()
    assert loop.everything() == unconstrained()
    snapshot = loop.snapshot()
    assert (snapshot.preemptions_total > 0) == preempts, "the test must force what it is about"
    assert (snapshot.swaps_total > 0) == swaps
    assert (snapshot.prefix_hits_total > 0) == config.prefix_cache
    assert snapshot.blocks_free == snapshot.blocks_total
    assert snapshot.host_blocks_free == snapshot.host_blocks_total


@settings(max_examples=5)
@given(
    seed=st.integers(0, 1000),
    num_blocks=st.integers(24, 60),
    host=st.sampled_from([0, 8, 100]),
    step_tokens=st.integers(8, 40),
    chunk_tokens=st.integers(1, 40),
    places=st.integers(1, 12),
)
def test_same_tokens_under_any_limits(
    seed: int, num_blocks: int, host: int, step_tokens: int, chunk_tokens: int, places: int
) -> None:
    requests = crowd(10, seed)
    alone = EngineLoop(ROOMY, checked=False)
    for request in requests:  # one after the other
        alone.add(request)
        alone.run()
    config = replace(
        TIGHT,
        num_blocks=num_blocks,
        num_host_blocks=host,
        step_tokens=step_tokens,
        chunk_tokens=chunk_tokens,
        max_sequences=places,
    )
    loop = EngineLoop(config)
    loop.add(*requests)
    loop.run()
    assert loop.everything() == alone.everything()
