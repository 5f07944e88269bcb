"""What a replica probably looks like now, and what a request would meet there.

A snapshot is always a little old. It is aged (the replica went on computing) and what this
dispatcher has sent since it was taken is added, so that a burst does not all go to the replica that
was idle a moment ago. What others have sent in the meantime is unknown until the next snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fabric.core.request import Request
from fabric.core.snapshot import ReplicaSnapshot

# A request that names no output length is reckoned with so many tokens, or its own limit.
OUTPUT_TOKENS = 256
# Of the time since a snapshot, the part that went into prompts; the rest went to decodes.
PROMPT_PART = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A request on its way: when (ns), the tokens to compute there, the output, all in tokens.

    `landing`: tokens computed elsewhere, whose KV comes there."""

    at: int
    rank: int
    tokens: int
    output: int
    landing: int = 0


def output_tokens(request: Request) -> int:
    """How many tokens are to come, of all choices together."""
    each = request.expected_tokens
    if each is None:
        each = min(request.sampling.max_tokens, OUTPUT_TOKENS)
    return each * request.sampling.n


@dataclass(slots=True, kw_only=True)
class Outlook:
    """One replica as one rank of requests sees it: better and equal ranks are ahead, worse ones
    give way. Times in ns; where a replica doesn't tell its speeds, a token takes one and a row too.
    """

    ahead_tokens: float
    ahead_sequences: int
    sequences: int
    output_left: int
    places: int
    step_ns: float
    token_ns: float
    row_ns: float
    blocks_free: float
    blocks_total: int

    def wait_ns(self, chunk_tokens: int, blocks: int) -> float:
        """Until its prompt is begun: what is ahead is computed, a place and `blocks` are free.

        `chunk_tokens`: how many prompt tokens a step holds, about."""
        steps = self.ahead_tokens / chunk_tokens
        wait = self.ahead_tokens * self.token_ns + steps * self.step_ns
        if self.sequences:
            wait += self.step_ns / 2  # the step that is under way
        # Sequences end one after the other, each after its tokens that are left.
        endings = 0.0
        if self.places and self.ahead_sequences >= self.places:
            endings = self.ahead_sequences - self.places + 1.0
        if self.blocks_total and blocks > self.blocks_free and self.sequences:
            each = (self.blocks_total - self.blocks_free) / self.sequences
            endings = max(endings, (blocks - self.blocks_free) / max(each, 1.0))
        if endings and self.sequences:
            running = min(self.sequences, self.places or self.sequences)
            mean_left = self.output_left / self.sequences
            wait += endings * mean_left * self.step_ns / running
        return wait

    def service_ns(self, tokens: int, output: int) -> float:
        """Computing so many tokens of the prompt, then the output beside all others."""
        beside = self.step_ns + self.row_ns
        return tokens * self.token_ns + output * beside

    def burden_ns(self, output: int) -> float:
        """What its output costs those that run there: a row more in each of their steps."""
        return output * self.row_ns * min(self.sequences, self.places or self.sequences)


def pace_ns(snapshot: ReplicaSnapshot, chunk_tokens: int) -> int:
    """Per prompt token, when a step takes `chunk_tokens` of them: its own time and its part of the
    step's. Where steps are bound by memory a token costs next to nothing, but steps still do."""
    return (snapshot.token_ns or 1) + -(-snapshot.step_ns // chunk_tokens)


def outlook(
    snapshot: ReplicaSnapshot,
    sent: Iterable[Sent],
    *,
    rank: int,
    now: int,
    block_size: int,
    chunk_tokens: int,
) -> Outlook:
    """What `snapshot` and what was `sent` since then say of a replica at `now`."""
    token_ns = float(snapshot.token_ns or 1)
    row_ns = float(snapshot.row_ns or 1)
    by_tier = snapshot.waiting_tokens_by_tier
    ahead = float(sum(by_tier[: rank + 1])) if by_tier else float(snapshot.waiting_tokens)
    counts = snapshot.sequences_by_tier
    sequences = snapshot.running + snapshot.swapped + snapshot.waiting
    first = sum(counts[: rank + 1]) if counts else sequences
    if snapshot.token_ns:
        pace = pace_ns(snapshot, chunk_tokens)
        ahead = max(0.0, ahead - PROMPT_PART * max(0, now - snapshot.taken) / pace)
    left, rows = snapshot.output_tokens_left, 0
    blocks = float(snapshot.blocks_free)
    for one in sent:
        rows += 1
        left += one.output
        blocks -= (one.tokens + one.landing + one.output / 2) / block_size
        if one.rank <= rank:
            ahead += one.tokens
            first += 1
    return Outlook(
        ahead_tokens=ahead,
        ahead_sequences=first,
        sequences=sequences + rows,
        output_left=left,
        places=snapshot.places,
        step_ns=float(snapshot.step_ns or sequences * row_ns) + rows * row_ns,
        token_ns=token_ns,
        row_ns=row_ns,
        blocks_free=max(blocks, 0.0),
        blocks_total=snapshot.blocks_total,
    )
