"""A row of logits that is not numbers ends its own request and nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit.local_engine import LocalEngine, ask
from torch import Tensor

from fabric.core.request import Finish
from fabric.worker.worker import Worker

BESIDE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "edited": {
        "temperature": 1.0,
        "seed": 3,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.5,
        "logit_bias": ((5, 4.0),),
        "logprobs": 2,
    },
}


def breaks_at(original: Callable[..., Any], call: int, row: int) -> Callable[..., Any]:
    """The `call`-th batch brings nonsense in one row."""
    calls = 0

    def run(*arguments: Any) -> Tensor:
        nonlocal calls
        logits_RV: Tensor = original(*arguments)
        if calls == call:
            with torch.inference_mode():
                logits_RV[row] = torch.nan
        calls += 1
        return logits_RV

    return run


@pytest.mark.parametrize("kind", BESIDE)
def test_only_its_own_request_ends(
    tiny_worker: Worker, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ask(f"q{i}", [3 + i, 9, 4] * 4, **BESIDE[kind]) for i in range(3)]
    alone = LocalEngine(tiny_worker).run(*requests)
    runner = tiny_worker._runner
    monkeypatch.setattr(runner, "run", breaks_at(runner.run, call=4, row=1))
    found = LocalEngine(tiny_worker).run(*requests)
    for name in (("q0", 0), ("q2", 0)):
        assert found[name] == alone[name]
    broken = found["q1", 0]
    assert broken.finish is Finish.NOT_FINITE
    assert broken.tokens == alone["q1", 0].tokens[:4], "as far as it got"
