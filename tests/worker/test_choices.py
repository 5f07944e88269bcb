"""`n` > 1: choices share the prompt's blocks, and are what they would be alone."""

from __future__ import annotations

from kit.local_engine import LocalEngine, ask

from fabric.core.engine.plan import CopyKind
from fabric.worker.worker import Worker

PROMPT = [504, 6376, 314] * 7  # 21 tokens: the second block is shared half full
SAMPLED = {"temperature": 1.0, "seed": 11, "n": 4}


def test_choices_are_what_they_would_be_alone(demo_worker: Worker) -> None:
    shared = LocalEngine(demo_worker)
    together = shared.run(ask("r", PROMPT, **SAMPLED))
    assert shared.copies(CopyKind.DEVICE) > 0, "a shared block was written to, so it was copied"

    single = LocalEngine(demo_worker, max_sequences=1, prefix_cache=False)
    one_by_one = single.run(ask("r", PROMPT, **SAMPLED))
    assert single.copies(CopyKind.DEVICE) == 0

    assert {key: o.tokens for key, o in together.items()} == {
        key: o.tokens for key, o in one_by_one.items()
    }
    assert len({tuple(output.tokens) for output in together.values()}) == 4


def test_the_first_choice_is_that_of_a_single_one(demo_worker: Worker) -> None:
    engine = LocalEngine(demo_worker)
    together = engine.run(ask("r", PROMPT, **SAMPLED))
    alone = engine.run(ask("s", PROMPT, **(SAMPLED | {"n": 1})))
    assert together["r", 0].tokens == alone["s", 0].tokens


def test_a_resumed_choice_goes_on_as_it_would_have(demo_worker: Worker) -> None:
    from dataclasses import replace

    engine = LocalEngine(demo_worker)
    request = ask("r", PROMPT, temperature=1.0, seed=5)
    whole = engine.run(request)["r", 0].tokens
    resumed = engine.run(replace(request, request_id="s", generated=(tuple(whole[:5]),)))
    assert whole[:5] + _tokens(resumed) == whole


def _tokens(outputs: object) -> list[int]:
    (output,) = outputs.values()  # type: ignore[attr-defined]
    return list(output.tokens)
