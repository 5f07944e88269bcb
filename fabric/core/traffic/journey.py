"""One request's way to its end, over as many replicas as it takes.

    outgoing ──> on a replica ── note(chunks) ──> every choice over
       ^              │ lost, or not sent
       └── Again <────┤
                      └──> GivenUp: so often in a row without one more token

It knows what its client has, so it goes on elsewhere from there: the engine computes prompt and
sent tokens again (or finds their KV), and draws what it would have drawn. Each time it goes out
under a name of its own: what an earlier replica still says of it is nobody's, and a replica that
has not noticed the loss yet takes it again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fabric.core.request import Finish, Request, TokenChunk

# How often it is sent in a row without bringing one more token: so a request ends, as its tokens
# are numbered.
ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """It shall go on elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp:
    """It was sent `attempts` times in a row in vain."""

    attempts: int


class Broken(ValueError):
    """What a replica sent does not go on from what was there before."""


class Journey:
    """What one client has of its request. `losses`: replicas that it lost, or did not reach."""

    __slots__ = ("_fruitless", "_over", "_sent", "_stopped", "losses", "request")

    def __init__(self, request: Request) -> None:
        n = request.sampling.n
        given = request.generated
        self.request = request  # as it was taken in
        self.losses = 0
        self._fruitless = 0  # attempts since the last token
        self._sent = [list(given[c]) if c < len(given) else [] for c in range(n)]
        self._over = list(request.over)
        self._stopped: list[int] = []  # asked to end; their last chunk has not come

    @property
    def done(self) -> bool:
        """Every choice is over, or not wanted any more."""
        return len(self._over) + len(self._stopped) == self.request.sampling.n

    @property
    def tokens(self) -> int:
        """How many its client has, of all choices."""
        return sum(map(len, self._sent))

    @property
    def name(self) -> str:
        """Under which it goes out now."""
        name = self.request.request_id
        return f"{name}+{self.losses}" if self.losses else name

    def outgoing(self) -> Request:
        """The request as it goes to a replica now."""
        request = self.request
        if not self.losses:
            return request
        over = tuple(sorted((*self._over, *self._stopped)))
        told = all(sent for choice, sent in enumerate(self._sent) if choice not in over)
        return replace(
            request,
            request_id=self.name,
            generated=tuple(map(tuple, self._sent)),
            over=over,
            # Told once; without asking, the prompt's KV may come from the cache.
            sampling=replace(request.sampling, prompt_logprobs=None) if told else request.sampling,
        )

    def note(self, chunks: tuple[TokenChunk, ...]) -> tuple[TokenChunk, ...]:
        """What of these is news to the client, under the request's own name.

        Raises `Broken`: a gap, or a choice that says more after its end."""
        return tuple(new for chunk in chunks if (new := self.take(chunk)) is not None)

    def take(self, chunk: TokenChunk) -> TokenChunk | None:
        """`note` of one; None: it is no news."""
        request_id = self.request.request_id
        if chunk.request_id != (self.name if self.losses else request_id):
            return None
        sent = self._sent[chunk.choice]
        if chunk.choice in self._over:
            raise Broken(f"choice {chunk.choice} is over")
        if chunk.finish is Finish.ABORT and chunk.choice not in self._stopped:
            raise Broken(f"choice {chunk.choice} was given up")
        if chunk.position != len(sent):
            raise Broken(f"choice {chunk.choice}: token {chunk.position} after {len(sent)}")
        sent += chunk.tokens
        if chunk.tokens:
            self._fruitless = 0
        if chunk.finish is not None:
            self._over.append(chunk.choice)
            if chunk.choice in self._stopped:
                self._stopped.remove(chunk.choice)
        return replace(chunk, request_id=request_id) if self.losses else chunk

    def stop(self, choice: int) -> None:
        """The client wants no more of a choice."""
        if choice not in self._over and choice not in self._stopped:
            self._stopped.append(choice)

    def lost(self) -> Again | GivenUp:
        """The replica it was on is lost, or was never reached."""
        self.losses += 1
        self._fruitless += 1
        if self._fruitless >= ATTEMPTS and not self.done:
            return GivenUp(attempts=self._fruitless)
        return Again()

    def rest(self) -> tuple[TokenChunk, ...]:
        """Last chunks of choices that were asked to end and whose replica can't say so any more."""
        chunks = tuple(self._end(choice) for choice in self._stopped)
        self._over += self._stopped
        self._stopped = []
        return chunks

    def check(self) -> None:
        """Its own numbers fit together."""
        assert len({*self._over, *self._stopped}) == len(self._over) + len(self._stopped)
        assert self._fruitless <= min(self.losses, ATTEMPTS), "more attempts than it may have"
        given = self.request.generated
        for choice, sent in enumerate(self._sent):
            before = given[choice] if choice < len(given) else ()
            assert tuple(sent[: len(before)]) == before, "what was sent stays sent"
            assert len(sent) <= self.request.sampling.max_tokens, "more than was asked for"

    def _end(self, choice: int) -> TokenChunk:
        return TokenChunk(
            request_id=self.request.request_id,
            choice=choice,
            position=len(self._sent[choice]),
            tokens=(),
            finish=Finish.ABORT,
        )
