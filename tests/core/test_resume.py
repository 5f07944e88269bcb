"""A request that was cut at any token goes on at another engine as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from kit.engine_loop import EngineLoop, ask

from fabric.core.configs import EngineConfig
from fabric.core.request import Request, TokenChunk

CONFIG = EngineConfig(
    block_size=4,
    num_blocks=60,
    num_host_blocks=20,
    max_sequences=6,
    step_tokens=12,
    chunk_tokens=7,
    context_limit=64,
    eos_token_ids=(7,),
)

requests = st.builds(
    lambda length, **sampling: ask("a", range(10, 10 + length), **sampling),
    st.integers(1, 20),
    max_tokens=st.integers(1, 20),
    min_tokens=st.integers(0, 6),
    n=st.integers(1, 4),
    seed=st.integers(0, 50),
    logprobs=st.none() | st.just(2),
    prompt_logprobs=st.none() | st.just(1),
)


def what_is_sent(request: Request, chunks: list[TokenChunk]) -> Request:
    """The request as it is resumed after its client got these."""
    generated: list[tuple[int, ...]] = [()] * request.sampling.n
    for chunk in chunks:
        generated[chunk.choice] += chunk.tokens
    over = tuple(chunk.choice for chunk in chunks if chunk.finish is not None)
    return replace(request, generated=tuple(generated), over=over)


def loop_of(request: Request, config: EngineConfig = CONFIG) -> EngineLoop:
    """One that runs the request, and others beside it."""
    loop = EngineLoop(config)
    others = [ask(f"o{i}", range(i, i + 9), max_tokens=6 + i, seed=i) for i in range(3)]
    loop.add(*others[:2], request, others[2])
    return loop


def mine(loop: EngineLoop) -> list[TokenChunk]:
    return [chunk for chunk in loop.chunks if chunk.request_id == "a"]


def by_choice(chunks: list[TokenChunk], choices: int) -> list[list[TokenChunk]]:
    """Without what only tells where the prompt's KV came from, and when it was begun."""
    told = [replace(chunk, cached_tokens=None, begun=None) for chunk in chunks]
    return [[one for one in told if one.choice == choice] for choice in range(choices)]


@settings(max_examples=25)
@given(request=requests, cuts=st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_cut_anywhere_and_resumed(request: Request, cuts: list[int]) -> None:
    whole = loop_of(request)
    whole.run()
    sent: list[TokenChunk] = []
    again = request
    for cut in cuts:
        loop = loop_of(again)
        while len(mine(loop)) < cut and loop.engine.has_work:
            loop.step()
        sent += mine(loop)
        again = what_is_sent(request, sent)
        if not again.choices_left:
            break
    else:
        last = loop_of(again, replace(CONFIG, num_blocks=25, prefix_cache=False))
        last.run()
        sent += mine(last)
    n = request.sampling.n
    assert by_choice(sent, n) == by_choice(mine(whole), n)


def test_what_was_generated_is_found_in_the_prefix_cache() -> None:
    request = ask("a", range(10, 22), max_tokens=17, ignore_eos=True)
    loop = EngineLoop(CONFIG)
    loop.add(request)
    loop.run()
    sent = loop.chunks[:13]
    loop.plans.clear()
    loop.add(what_is_sent(request, sent))
    loop.run()
    # 12 + 13 tokens, of which six blocks are known; one is left to compute.
    assert (loop.plans[0].steps[0].start, loop.plans[0].steps[0].count) == (24, 1)
    assert [*sent, *loop.chunks[17:]] == loop.chunks[:17]
