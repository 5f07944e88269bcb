"""`fabric.driver.LLM`: scripts, on a tiny model."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from fabric.core.errors import ConfigError, RequestError
from fabric.driver import LLM, SamplingParams


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(str(tiny_folder), dtype="float32", device_bytes=4 << 20, max_sequences=8)


@pytest.fixture(autouse=True)
def accounts(llm: LLM) -> object:
    """After each test nothing runs and no block is held."""
    yield
    llm.engine.check()
    snapshot = llm.engine.snapshot("local", 0)
    assert not llm.engine.has_work
    assert snapshot.blocks_free == snapshot.blocks_total


def test_prompts_of_all_kinds(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = SamplingParams(max_tokens=8, temperature=0)
    (one,) = llm.generate("hello world", greedy)
    assert "1/1" in capsys.readouterr().err
    two = llm.generate(["hello world", list(one.prompt_tokens)], greedy, progress=False)
    assert capsys.readouterr().err == ""
    assert [c.text for c in two] == [one.text] * 2
    (ids,) = llm.generate(list(one.prompt_tokens), greedy, progress=False)
    assert ids.choices == one.choices
    assert one.choices[0].finish == "length" and len(one.choices[0].tokens) == 8
    assert ids.choices[0].logprobs is None and ids.prompt_logprobs is None
    with pytest.raises(ValueError, match="a list of its own"):
        llm.generate(["hello world", 5], greedy)  # type: ignore[list-item]


def test_a_parameter_for_each_prompt(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=5, n=3, seed=1, logprobs=2)]
    short, several = llm.generate(["the fox", "the fox"], each, progress=False)
    assert len(short.choices[0].tokens) == 2
    assert [len(choice.tokens) for choice in several.choices] == [5, 5, 5]
    assert all(len(choice.logprobs or ()) == 5 for choice in several.choices)
    with pytest.raises(ValueError, match="2 prompts, but 1 sampling"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_stop_strings(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=0)
    whole = llm.generate("hello world", params, progress=False)[0].text
    middle = whole[len(whole) // 2 :][:2]
    (cut,) = llm.generate(
        "hello world", SamplingParams(max_tokens=12, temperature=0, stop=middle), progress=False
    )
    assert cut.text == whole[: whole.index(middle)]
    assert (cut.choices[0].finish, cut.choices[0].stop_reason) == ("stop", middle)


def test_chat_goes_through_the_template(llm: LLM) -> None:
    answer = llm.chat([{"role": "user", "content": "tell me"}], SamplingParams(max_tokens=3))
    assert len(answer.choices[0].tokens) <= 3
    assert len(answer.prompt_tokens) > 5
    with pytest.raises(RequestError, match="role"):
        llm.chat([{"role": "king", "content": "tell me"}])


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", SamplingParams(), "empty"),
        ([1, 9999], SamplingParams(), "9999"),
        ("hello", SamplingParams(temperature=-1), "temperature"),
        ("hello", SamplingParams(max_tokens=100_000), "context"),
        ("hello", SamplingParams(logit_bias={9999: 1}), "logit_bias"),
        ([5] * 256, SamplingParams(), "256"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(
    llm: LLM, prompt: str | list[int], params: SamplingParams, message: str
) -> None:
    steps = llm.engine.snapshot("local", 0).steps_total
    with pytest.raises(RequestError, match=message):
        llm.generate([[5, 6], prompt], [SamplingParams(max_tokens=2), params], progress=False)
    assert llm.engine.snapshot("local", 0).steps_total == steps


def test_settings_are_named(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="no setting 'speed'; valid: block_size"):
        LLM(str(tiny_folder), speed=11)
    with pytest.raises(ConfigError, match="memory is free"):
        LLM(str(tiny_folder), dtype="float32", device_bytes=1 << 60)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"model\.device: .* CUDA"):
            LLM(str(tiny_folder), device="cuda")


def test_what_preemption_costs_is_measured(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine decides by the figures in the log, which no two loads have in common."""
    few = {"dtype": "float32", "device_bytes": 4 << 20, "context_limit": 64}
    for host_bytes, swaps in ((1 << 20, True), (0, False)):
        costs = LLM(str(tiny_folder), host_bytes=host_bytes, **few).engine.config.preemption
        swap = f"{costs.swap_ns_per_block / 1e3:,.0f} µs a block" if swaps else "off"
        recompute = f"{costs.recompute_ns_per_token / 1e3:,.0f} µs a token"
        assert f"preemption: recompute {recompute}, swap {swap}" in capsys.readouterr().err
        assert costs.recompute_ns_per_token > 0
        assert (costs.swap_ns_per_block > 0) == swaps


def test_ctrl_c_ends_after_the_step_and_leaves_it_usable(llm: LLM) -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7]] * 64, params, progress=False)
    timer.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert len(llm.generate("hello", SamplingParams(max_tokens=3, ignore_eos=True))) == 1
