"""Every sampling parameter through engine and worker, against transformers in float32.

The tiny model is computed in float32 here and there, so logits agree to about 1e-5 and greedy
choices agree unless two logits are closer than that (they aren't, with these seeds).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from kit.local_engine import LocalEngine, Output, ask
from kit.reference import reference_logits
from torch import Tensor

from fabric.core.request import Finish, TokenLogprobs
from fabric.worker.worker import Worker

PROMPT = [5, 99, 200, 31, 99, 7, 150, 42, 99, 12, 260, 88, 3, 17, 99, 64, 250, 8]
LIKED = (99, 214, 7, 42)  # lifted by a bias where a test needs tokens that come again
LIFT = tuple((token, 3.0) for token in LIKED)


@pytest.fixture
def engine(tiny_worker: Worker) -> LocalEngine:
    return LocalEngine(tiny_worker)


def run(engine: LocalEngine, **sampling: object) -> Output:
    return engine.run(ask("r", PROMPT, **sampling))["r", 0]


def last_logits(folder: Path, tokens: list[int]) -> Tensor:
    return reference_logits(folder, tokens, torch.float32)[-1]


def lift(logits: Tensor) -> Tensor:
    logits[list(LIKED)] += 3.0
    return logits


def expect(folder: Path, steps: int, edit: object = None) -> list[int]:
    """Greedy tokens of transformers, `edit(logits, output)` applied before each choice."""
    output: list[int] = []
    for _ in range(steps):
        logits = last_logits(folder, PROMPT + output)
        if edit is not None:
            logits = edit(logits.clone(), output)  # type: ignore[operator]
        output.append(int(logits.argmax()))
    return output


def test_greedy(engine: LocalEngine, tiny_folder: Path) -> None:
    output = run(engine)
    assert output.tokens == expect(tiny_folder, 10)
    assert output.finish is Finish.LENGTH


def test_repetition_penalty(engine: LocalEngine, tiny_folder: Path) -> None:
    """As transformers' own processor has it: prompt and output alike."""
    from transformers import RepetitionPenaltyLogitsProcessor

    processor = RepetitionPenaltyLogitsProcessor(3.0)

    def edit(logits: Tensor, output: list[int]) -> Tensor:
        return lift(processor(torch.tensor([PROMPT + output]), logits[None])[0])

    expected = expect(tiny_folder, 10, edit)
    unpunished = expect(tiny_folder, 10, lambda logits, _: lift(logits))
    assert expected != unpunished, "the penalty changes something here"
    assert run(engine, repetition_penalty=3.0, logit_bias=LIFT).tokens == expected


def test_frequency_and_presence_penalty(engine: LocalEngine, tiny_folder: Path) -> None:
    """OpenAI's formula, over the output only."""

    def edit(logits: Tensor, output: list[int]) -> Tensor:
        for token, count in Counter(output).items():
            logits[token] -= 0.9 * count + 0.4
        return lift(logits)

    expected = expect(tiny_folder, 24, edit)
    counts = Counter(expected)
    assert len(counts) > 4 and max(counts.values()) > 2, "counts matter here"
    punished = run(
        engine, frequency_penalty=0.9, presence_penalty=0.4, logit_bias=LIFT, max_tokens=24
    )
    assert punished.tokens == expected


def test_penalties_after_preemption(tiny_worker: Worker) -> None:
    """A recomputed sequence counts its old output as output."""
    sampling = {"frequency_penalty": 0.9, "logit_bias": LIFT, "max_tokens": 24}
    whole = run(LocalEngine(tiny_worker), **sampling)
    scarce = LocalEngine(tiny_worker, num_blocks=14, prefix_cache=False)
    scarce.begin(ask("r", PROMPT, **sampling))
    for _ in range(9):
        scarce.step()
    scarce.begin(ask("intruder", list(range(10, 200)), priority=-1))
    outputs = scarce.finish()
    assert scarce.engine.snapshot("local", 0).preemptions_total > 0
    assert outputs["r", 0].tokens == whole.tokens


def test_logit_bias(engine: LocalEngine, tiny_folder: Path) -> None:
    first = expect(tiny_folder, 1)[0]

    def edit(logits: Tensor, output: list[int]) -> Tensor:
        logits[first] -= 100
        logits[77] += 1.5
        return logits

    output = run(engine, logit_bias=((first, -100.0), (77, 1.5)))
    assert output.tokens == expect(tiny_folder, 10, edit)
    assert first not in output.tokens


def test_logprobs_are_of_the_raw_distribution(engine: LocalEngine, tiny_folder: Path) -> None:
    output = run(engine, logprobs=4, logit_bias=((77, 5.0),), temperature=0.7, seed=3)
    for index, (token, said) in enumerate(zip(output.tokens, output.logprobs, strict=True)):
        logits = last_logits(tiny_folder, PROMPT + output.tokens[:index])
        check_logprobs(said, token, logits, top=4)
    assert any(said.rank > 1 for said in output.logprobs)


def test_prompt_logprobs(engine: LocalEngine, tiny_folder: Path) -> None:
    """Also over several chunks and slices; and the next token does not mind."""
    prompt = (PROMPT * 9)[:150]
    logits_TV = reference_logits(tiny_folder, prompt, torch.float32)
    for chunk_tokens in (512, 37):
        settled = LocalEngine(engine.worker, chunk_tokens=chunk_tokens)
        output = settled.run(ask("r", prompt, prompt_logprobs=2))["r", 0]
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for position in range(1, len(prompt)):
            said = output.prompt_logprobs[position]
            assert said is not None
            check_logprobs(said, prompt[position], logits_TV[position - 1], top=2)
        assert output.tokens[0] == int(logits_TV[-1].argmax())


def check_logprobs(said: TokenLogprobs, token: int, logits: Tensor, *, top: int) -> None:
    """Against log_softmax. 2e-4: float32 logits of two implementations, 10 apart at most."""
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert said.token == token
    assert said.logprob == pytest.approx(float(expected[token]), abs=2e-4)
    assert said.rank == 1 + int((logits > logits[token]).sum())
    best = torch.topk(logits, top)
    assert [t for t, _ in said.top] == best.indices.tolist()
    assert [p for _, p in said.top] == pytest.approx(expected[best.indices].tolist(), abs=2e-4)


def test_stop_tokens(engine: LocalEngine, tiny_folder: Path) -> None:
    greedy = expect(tiny_folder, 10)
    stop = greedy[4]
    output = run(engine, stop_token_ids=(stop,))
    assert output.tokens == greedy[: greedy.index(stop) + 1]
    assert output.finish is Finish.STOP


def test_the_end_of_sequence_and_ignoring_it(engine: LocalEngine) -> None:
    (eos,) = engine.worker.config.eos_token_ids
    towards = ((eos, 100.0),)
    assert run(engine, logit_bias=towards, ignore_eos=False).tokens == [eos]
    assert run(engine, logit_bias=towards, ignore_eos=True).tokens == [eos] * 10


def test_min_tokens(engine: LocalEngine) -> None:
    """Neither the end of sequence nor a stop token can come sooner, however likely."""
    (eos,) = engine.worker.config.eos_token_ids
    towards = ((eos, 100.0), (33, 99.0))
    output = run(engine, logit_bias=towards, ignore_eos=False, stop_token_ids=(33,), min_tokens=6)
    assert len(output.tokens) == 7 and output.tokens[-1] == eos
    assert not {eos, 33} & set(output.tokens[:-1])


def test_filters_keep_their_support(engine: LocalEngine, tiny_folder: Path) -> None:
    """Forty first tokens under each filter; all of them lie where they may."""
    logits = last_logits(tiny_folder, PROMPT)
    probabilities = torch.softmax(logits.double() / 2.5, dim=-1)
    order = probabilities.argsort(descending=True)
    inside = int((probabilities[order].cumsum(0) < 0.6).sum()) + 1
    rules = {
        "top_k": ({"top_k": 5}, set(order[:5].tolist())),
        "top_p": ({"top_p": 0.6}, set(order[:inside].tolist())),
        "min_p": (
            {"min_p": 0.3},
            set((probabilities >= 0.3 * probabilities.max()).nonzero()[:, 0].tolist()),
        ),
    }
    for name, (sampling, allowed) in rules.items():
        asked = [
            ask(f"{name} {seed}", PROMPT, temperature=2.5, seed=seed, max_tokens=1, **sampling)
            for seed in range(40)
        ]
        drawn = {output.tokens[0] for output in engine.run(*asked).values()}
        assert drawn <= allowed, name
        assert len(drawn) > 1, f"{name}: seeds make a difference"
