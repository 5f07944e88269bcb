"""A request that was cut at any token goes on elsewhere with the same bits: real kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from kit.local_engine import LocalEngine, Output, ask

from fabric.core.request import Request
from fabric.worker.worker import Worker

PROMPT = [504, 6376, 314] * 7
LENGTH = 8
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.9, "top_k": 40},
    "penalties": {
        "temperature": 0.8,
        "seed": 3,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.4,
        "logit_bias": ((314, -3.0), (260, 2.0)),
        "logprobs": 2,
    },
    "choices": {"temperature": 1.0, "seed": 11, "n": 3, "logprobs": 0},
    "not too short": {"temperature": 1.5, "seed": 2, "ignore_eos": False, "min_tokens": LENGTH},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_any_cut_goes_on_with_the_same_bits(demo_worker: Worker, name: str) -> None:
    request = ask("r", PROMPT, max_tokens=LENGTH, **REQUESTS[name])
    whole = LocalEngine(demo_worker).run(request)
    n = request.sampling.n
    assert {len(whole["r", choice].tokens) for choice in range(n)} == {LENGTH}
    cuts = [0, 1, 4, LENGTH - 1] if n == 1 else [0, 5]
    # A fresh engine in other surroundings: short chunks, another request beside it. The cuts run
    # one after the other, so a later one finds its past in the prefix cache, the first ones don't.
    fresh = LocalEngine(demo_worker, step_tokens=16, chunk_tokens=9)
    for cut in reversed(cuts):
        again = cut_at(request, whole, cut)
        beside = ask(f"b{cut}", [260 + cut] * 20, max_tokens=4)
        rest = fresh.run(beside, again)
        for choice in range(n):
            if choice in again.over:
                assert (again.request_id, choice) not in rest
                continue
            before, after = whole["r", choice], rest[again.request_id, choice]
            begin = len(again.generated[choice])
            assert after.begin == begin, "no gap, no repeat"
            assert after.tokens == before.tokens[begin:]
            assert after.logprobs == before.logprobs[begin:]
            assert after.finish == before.finish


def cut_at(request: Request, whole: dict[tuple[str, int], Output], cut: int) -> Request:
    """What its client has when it is lost: each choice one token further than the one before."""
    lengths = [min(cut + choice, LENGTH) for choice in range(request.sampling.n)]
    generated = [tuple(whole["r", c].tokens[:length]) for c, length in enumerate(lengths)]
    over = tuple(choice for choice, length in enumerate(lengths) if length == LENGTH)
    return replace(request, request_id=f"c{cut}", generated=tuple(generated), over=over)
