"""A trace becomes requests again: at another speed, at another size, with prompts made up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from fabric.core.request import Request, SamplingParams
from fabric.workload import ORDINARY_TOKENS, SECOND_NS
from fabric.workload.trace import HASH_BLOCK, Entry, read_trace

# So many tokens at a prompt's begin are its own; the rest is cut out of one long text. Two blocks
# of the largest size: no prefix is found where there is none.
OWN_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """How a trace is replayed. `speed` 2: in half the time. `rate_per_s`: at this mean rate, over
    `speed`. `scale`: of prompts and outputs, at least one token of each. `skip`, `limit`: requests.
    `tier`: of requests whose trace names none."""

    seed: str = "0"
    speed: float = 1.0
    rate_per_s: float | None = None
    scale: float = 1.0
    skip: int = 0
    limit: int | None = None
    tier: str = "standard"

    def __post_init__(self) -> None:
        positive = (self.speed, self.scale, self.rate_per_s if self.rate_per_s is not None else 1.0)
        if min(positive) <= 0:
            raise ValueError("speed, rate and scale must be above 0")
        if self.skip < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError("a replay needs skip >= 0 and a limit of at least 1")


def replay(path: Path, how: Replay) -> Iterator[Request]:
    """Greedy requests that run to the trace's output length (`ignore_eos`), lazily, in order.

    Prompts are made up: those with hash ids share what the trace says they share, others share
    nothing. Raises `ValueError` that names file and line.
    """
    wanted = how.rate_per_s
    speed = how.speed if wanted is None else wanted / mean_rate_per_s(path, how)
    text = _Text(how.seed)
    began: int | None = None
    for index, entry in enumerate(_cut(path, how)):
        began = entry.at if began is None else began
        yield Request(
            request_id=f"{how.seed}/{path.stem}/{index}",
            prompt=text.prompt(index, entry, how.scale),
            sampling=SamplingParams(
                max_tokens=max(1, round(entry.output * how.scale)), temperature=0.0, ignore_eos=True
            ),
            arrival=round((entry.at - began) / speed),
            tier=entry.tier or how.tier,
            tenant=entry.tenant,
        )


def mean_rate_per_s(path: Path, how: Replay) -> float:
    """Requests a second in the part that is replayed, as recorded. Reads it once."""
    count, first, last = 0, 0, 0
    for entry in _cut(path, how):
        first = entry.at if not count else first
        last, count = entry.at, count + 1
    if count < 2 or last == first:
        raise ValueError(f"{path}: fewer than two moments have no rate; give a speed instead")
    return (count - 1) * SECOND_NS / (last - first)


def _cut(path: Path, how: Replay) -> Iterator[Entry]:
    end = None if how.limit is None else how.skip + how.limit
    return islice(read_trace(path, end), how.skip, None)


class _Text:
    """Tokens for prompts. They share their int objects: a million prompts have to fit."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._tokens = tuple(ORDINARY_TOKENS)
        self._long = tuple(Random(f"{seed}/text").choices(self._tokens, k=1 << 16))

    def prompt(self, index: int, entry: Entry, scale: float) -> tuple[int, ...]:
        length = max(1, round(entry.prompt * scale))
        if not entry.hash_ids:
            return self._piece(f"request/{index}", length)
        block = max(1, round(HASH_BLOCK * scale))
        tokens: list[int] = []
        for number in entry.hash_ids:
            tokens += self._piece(f"block/{number}", min(block, length - len(tokens)))
        if len(tokens) < length:  # rounding; the tail is this request's own
            tokens += self._piece(f"request/{index}", length - len(tokens))
        return tuple(tokens)

    def _piece(self, name: str, length: int) -> tuple[int, ...]:
        random = Random(f"{self._seed}/{name}")
        own = tuple(random.choices(self._tokens, k=min(length, OWN_TOKENS)))
        tokens, long = own, self._long
        while len(tokens) < length:
            start = random.randrange(len(long))
            tokens += long[start : start + length - len(tokens)]
        return tokens
