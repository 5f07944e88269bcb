"""What comes in and what goes out, `Request` and `TokenChunk`: only tokens, no text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Finish(StrEnum):
    """Why a choice ended."""

    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"  # the client left, or a stop string was found in the text
    ERROR = "error"  # the step that it was in failed, and with it the engine
    NOT_FINITE = "not_finite"  # the model's output for it was not a number


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How each next token is drawn. What is off is None (or the neutral number).

    `logprobs`: how many alternatives to report beside each chosen token (0: only the chosen one).
    `prompt_logprobs`: the same for the prompt's tokens. `seed` is filled in by whoever builds the
    `Request`; the noise of a token is a function of (seed, choice, position) and of nothing else.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation request, in tokens.

    A resumed one goes on elsewhere from what its client has: `generated` are, per choice, the
    tokens that were already sent (empty for a new one), `over` the choices that have come to their
    end, of which nothing more is wanted. Tokens, log-probabilities and positions of what follows
    are those of an undisturbed run. Prompt logprobs and `cached_tokens` were told with a choice's
    first chunk and don't come again.

    `priority`: the lower the sooner (0 is ordinary). `model_version`, `adapter` and `tenant` salt
    the prefix cache. `arrival` and `deadline` are ns. `expected_tokens`: how long an output the
    dispatcher reckons with, each choice (None: it can't tell). `served_as`: the better tier as
    which it runs, since its own was passed over for too long (None: as its own).
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    arrival: int
    model_version: str = ""
    adapter: str | None = None
    tenant: str = ""
    tier: str = "standard"
    priority: int = 0
    deadline: int | None = None
    generated: tuple[tuple[int, ...], ...] = ()
    over: tuple[int, ...] = ()
    expected_tokens: int | None = None
    served_as: str | None = None

    @property
    def resumed(self) -> bool:
        """Its client has tokens of it."""
        return any(self.generated)

    @property
    def choices_left(self) -> int:
        """How many choices are still to come to their end."""
        return self.sampling.n - len(self.over)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probability of one token and of the likeliest ones: natural log, raw distribution.

    `rank` is 1 for the likeliest. `top` is (token, logprob), likeliest first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """New tokens of one choice.

    `position` is the output index of `tokens[0]`: a receiver can drop doubles. `cached_tokens`
    (prompt tokens found in the prefix cache), `begun` (when the request's first step was planned,
    ns) and `prompt_logprobs` (one entry a prompt token, None for the first) come on the first chunk
    of a choice, None afterwards. A stop token is included
    in `tokens`; `stop_token` names it. `finish` is None while running.
    """

    request_id: str
    choice: int
    position: int
    tokens: tuple[int, ...]
    finish: Finish | None = None
    stop_token: int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int | None = None
    begun: int | None = None
