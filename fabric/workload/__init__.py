"""Who asks for what, and when: seeded `Request`s, the same for the simulator and the benchmark.

A `Workload` says how long prompts and outputs are, what they share and who sends them; `Arrivals`
says when. Same arguments, same requests, on any machine: every draw comes from a stream seeded with
(seed, workload, what is drawn), so a different rate changes the times and not the contents, and
request i is the same however many follow it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fabric.core.request import Request, SamplingParams

SECOND_NS = 1_000_000_000
FOLDER = Path(__file__).parent.parent / "workloads"

# Ordinary tokens of every vocabulary in use: special tokens sit below or far above.
ORDINARY_TOKENS = range(1_000, 30_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Token counts: log-normal with this median, clipped to [low, high].

    `sigma` is the standard deviation of the natural logarithm; 0 gives the median every time.
    """

    median: int
    sigma: float = 0.0
    low: int = 1
    high: int = 1 << 20

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.median <= self.high or self.sigma < 0:
            raise ValueError(f"lengths need 1 <= low <= median <= high and sigma >= 0: {self}")

    def draw(self, random: Random) -> int:
        """One count, in tokens."""
        if self.sigma == 0:
            return self.median
        drawn = math.exp(random.gauss(math.log(self.median), self.sigma))
        return min(self.high, max(self.low, round(drawn)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TierShare:
    """A tier and its part of the requests; parts are weights and need not sum to one."""

    tier: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What requests look like.

    `prompt` is what each request has of its own; before it come `prefix` tokens which all requests
    of a group share (`prefix_groups` of them: system prompts, documents). Group k is asked for in
    proportion to (k + 1) ** -`prefix_skew`: 0 makes all equally likely, 1 is Zipf's law.
    """

    name: str
    prompt: Lengths
    output: Lengths
    prefix: int = 0
    prefix_groups: int = 1
    prefix_skew: float = 0.0
    tiers: tuple[TierShare, ...] = (TierShare(tier="standard", weight=1.0),)

    def __post_init__(self) -> None:
        if self.prefix < 0 or self.prefix_groups < 1 or self.prefix_skew < 0:
            raise ValueError("prefix and prefix_skew must be >= 0 and prefix_groups >= 1")
        if not self.tiers or any(share.weight <= 0 for share in self.tiers):
            raise ValueError("a workload needs at least one tier, each of positive weight")

    @property
    def longest(self) -> int:
        """Most tokens that one request can need, prompt and output together."""
        high_prompt = self.prompt.high if self.prompt.sigma else self.prompt.median
        high_output = self.output.high if self.output.sigma else self.output.median
        return self.prefix + high_prompt + high_output


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """An open loop: gaps of mean 1/`rate_per_s`, gamma distributed.

    `variation` is the gaps' coefficient of variation: 1 makes a Poisson process, 0 a metronome,
    more than 1 bursts (the code half of Azure's 2023 trace is far above, its chat half near 1).
    """

    rate_per_s: float
    variation: float = 1.0

    def __post_init__(self) -> None:
        if self.rate_per_s <= 0 or self.variation < 0:
            raise ValueError(f"arrivals need a positive rate and a variation >= 0: {self}")

    def times(self, random: Random) -> Iterator[int]:
        """Arrival times in ns after the start, without end, rising."""
        at_s = 0.0
        while True:
            at_s += self._gap(random)
            yield round(at_s * SECOND_NS)

    def _gap(self, random: Random) -> float:
        if self.variation == 0:
            return 1 / self.rate_per_s
        shape = 1 / self.variation**2
        return random.gammavariate(shape, 1 / (shape * self.rate_per_s))


WORKLOADS: tuple[Workload, ...] = (
    Workload(name="chat", prompt=Lengths(median=128), output=Lengths(median=128)),
    Workload(name="decode", prompt=Lengths(median=32), output=Lengths(median=256)),
    Workload(name="prefill", prompt=Lengths(median=1024), output=Lengths(median=32)),
    Workload(name="prefix", prompt=Lengths(median=32), output=Lengths(median=64), prefix=1024),
    Workload(
        name="mixed",
        prompt=Lengths(median=256, sigma=0.8, low=16, high=1024),
        output=Lengths(median=96, sigma=0.7, low=8, high=384),
    ),
)


def workload(name: str) -> Workload:
    """A workload by name. Raises `ValueError` that lists the names there are."""
    for one in WORKLOADS:
        if one.name == name:
            return one
    raise ValueError(f"no workload {name!r}; there are {', '.join(w.name for w in WORKLOADS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Workloads side by side: each with its share of the requests (weights)."""

    name: str
    parts: tuple[tuple[float, Workload], ...]
    variation: float = 1.0

    def generate(self, *, count: int, seed: str, rate_per_s: float) -> list[Request]:
        """About `count` requests in order of arrival, at that rate together."""
        total = sum(weight for weight, _ in self.parts)
        requests: list[Request] = []
        for weight, shape in self.parts:
            share = weight / total
            arrivals = Arrivals(rate_per_s=rate_per_s * share, variation=self.variation)
            requests += generate(shape, count=round(count * share), seed=seed, arrivals=arrivals)
        return sorted(requests, key=lambda one: (one.arrival, one.request_id))


def read_mix(name: str) -> Mix:
    """A named file of fabric/workloads: see heavy_tailed.json. Raises `ValueError`."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"no workload file {path}")
    data = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for part in data["parts"]:
        weight = part.pop("share")
        prompt, output = Lengths(**part.pop("prompt")), Lengths(**part.pop("output"))
        parts.append((weight, Workload(prompt=prompt, output=output, **part)))
    return Mix(name=name, parts=tuple(parts), variation=data["variation"])


def generate(
    shape: Workload,
    *,
    count: int,
    seed: str,
    arrivals: Arrivals | None = None,
    tokens: range = ORDINARY_TOKENS,
) -> Iterator[Request]:
    """`count` requests in order of arrival, lazily; greedy and to the full length (`ignore_eos`).

    `arrivals` None: all at time 0 (a closed loop sends the next when one is done). `tokens`:
    prompts are drawn uniformly from this range of ids. Arrival times are ns after the start.
    """
    key = f"{seed}/{shape.name}"
    times = arrivals.times(Random(f"{key}/arrivals")) if arrivals else None
    sizes, senders = Random(f"{key}/sizes"), Random(f"{key}/tiers")
    prefixes = [
        tuple(Random(f"{key}/prefix/{group}").choices(tokens, k=shape.prefix))
        for group in range(shape.prefix_groups)
    ]
    popularity = [(group + 1) ** -shape.prefix_skew for group in range(shape.prefix_groups)]
    names = [share.tier for share in shape.tiers]
    weights = [share.weight for share in shape.tiers]
    for index in range(count):
        own = Random(f"{key}/prompt/{index}")
        prefix = own.choices(prefixes, popularity)[0] if shape.prefix_skew else own.choice(prefixes)
        length, output = shape.prompt.draw(sizes), shape.output.draw(sizes)
        yield Request(
            request_id=f"{key}/{index}",
            prompt=prefix + tuple(own.choices(tokens, k=length)),
            sampling=SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True),
            arrival=next(times) if times else 0,
            tier=senders.choices(names, weights)[0],
        )
