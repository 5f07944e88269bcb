"""Logits -> samples: edits (penalties, bias, masks), the draw, and log-probabilities.

Per row, in this order: penalties, logit_bias, then -inf for the tokens that would end the
choice before min_tokens; then the draw (`fabric.kernels.sampling`). Log-probabilities are of the
raw row. Edits touch only the tokens they name, and a batch of plain greedy rows skips everything
but one argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy
import torch
from torch import Tensor

from fabric.core.engine.plan import Sample, SequenceStart
from fabric.core.request import SamplingParams, TokenLogprobs
from fabric.kernels.sampling import GREEDY_BELOW, Draw, NoFiniteLogit, Ranked, penalise
from fabric.kernels.sampling_kernels import SamplingKernels

T = TypeVar("T")


class SamplingState:
    """What drawing a sequence's next token needs, worked out once.

    `plain`: greedy, no edits, no log-probabilities: the row needs an argmax and nothing else.
    """

    __slots__ = ("bias", "choice", "ending", "params", "plain", "prompt_length", "seed", "seen")

    def __init__(self, start: SequenceStart, eos_token_ids: tuple[int, ...]) -> None:
        params = start.sampling
        self.params = params
        self.choice = start.choice
        self.seed = params.seed & 0xFFFF_FFFF_FFFF_FFFF
        self.prompt_length = start.prompt_length
        self.seen = SeenTokens(start.prompt_length) if _penalised(params) else None
        self.bias = _bias(params)
        ending = params.stop_token_ids + (() if params.ignore_eos else eos_token_ids)
        self.ending = torch.tensor(sorted(set(ending))) if params.min_tokens and ending else None
        self.plain = (
            params.temperature < GREEDY_BELOW
            and params.logprobs is None
            and self.seen is None
            and self.bias is None
            and self.ending is None
        )

    def edits(self, length: int) -> bool:
        """Does the row of a history this long change before the draw?"""
        return self.seen is not None or self.bias is not None or self._too_short(length)

    def edit(self, logits_V: Tensor, tokens: Sequence[int]) -> None:
        """Penalties, bias and masks, in place."""
        params = self.params
        if self.seen is not None:
            seen, counts = self.seen.update(tokens)
            penalise(
                logits_V,
                seen=seen.to(logits_V.device),
                counts=counts.to(logits_V.device),
                repetition=params.repetition_penalty,
                frequency=params.frequency_penalty,
                presence=params.presence_penalty,
            )
        if self.bias is not None:
            ids, values = self.bias
            logits_V[ids.to(logits_V.device)] += values.to(logits_V.device)
        if self._too_short(len(tokens)):
            assert self.ending is not None
            logits_V[self.ending.to(logits_V.device)] = -torch.inf

    def draw(self, row: int, position: int) -> Draw:
        """The kernel's record of a token that will stand at `position` of the history."""
        params = self.params
        return Draw(
            row,
            self.seed,
            self.choice,
            position,
            params.temperature,
            params.top_p,
            params.min_p,
            params.top_k or 0,
        )

    def _too_short(self, length: int) -> bool:
        return self.ending is not None and length - self.prompt_length < self.params.min_tokens


class SeenTokens:
    """Each token of a history once, with its count in the output; brought up to date lazily."""

    __slots__ = ("_counts", "_index", "_length", "_prompt_length", "_tokens")

    def __init__(self, prompt_length: int) -> None:
        self._prompt_length = prompt_length
        self._length = 0  # of the history, as far as it is counted
        self._index: dict[int, int] = {}
        self._tokens = numpy.zeros(256, numpy.int64)
        self._counts = numpy.zeros(256, numpy.int64)

    def update(self, history: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(tokens, counts in the output), int64, views that are valid until the next call."""
        for position in range(self._length, len(history)):
            token = history[position]
            slot = self._index.setdefault(token, len(self._index))
            if slot == len(self._tokens):
                self._tokens = numpy.concatenate((self._tokens, numpy.zeros_like(self._tokens)))
                self._counts = numpy.concatenate((self._counts, numpy.zeros_like(self._counts)))
            self._tokens[slot] = token
            self._counts[slot] += position >= self._prompt_length
        self._length = len(history)
        used = len(self._index)
        return torch.from_numpy(self._tokens[:used]), torch.from_numpy(self._counts[:used])


class Sampler:
    """Draws for all rows of a step."""

    def __init__(self, kernels: SamplingKernels) -> None:
        self._kernels = kernels

    def sample(
        self, logits_RV: Tensor, rows: Sequence[tuple[SamplingState, Sequence[int]]]
    ) -> list[Sample]:
        """One `Sample` a row; `rows` are (state, history), in the order of the logits.

        A row without a finite logit gets no token. The logits are spent afterwards."""
        if all(state.plain for state, _ in rows):
            tokens, bad = _without_bad_rows(self._kernels.greedy, logits_RV)
            assert len(tokens) == len(rows)
            samples = [Sample(token=token) for token in tokens]
        else:
            assert logits_RV.shape[0] == len(rows)
            with torch.inference_mode():  # an executor's logits may be such a tensor
                samples, bad = self._sample(logits_RV, rows)
        for row in bad:
            samples[row] = Sample(token=None)
        return samples

    def _sample(
        self, logits_RV: Tensor, rows: Sequence[tuple[SamplingState, Sequence[int]]]
    ) -> tuple[list[Sample], list[int]]:
        raw: dict[int, Tensor] = {}
        draws = []
        for row, (state, history) in enumerate(rows):
            if state.edits(len(history)):
                if state.params.logprobs is not None:
                    raw[row] = logits_RV[row].clone()
                state.edit(logits_RV[row], history)
            draws.append(state.draw(row, len(history)))
        tokens, bad = _without_bad_rows(lambda rows: self._kernels.draw(rows, draws), logits_RV)
        for row, logits_V in raw.items():
            if row not in bad:
                logits_RV[row] = logits_V
        asks = [
            (row, token, state.params.logprobs)
            for row, (token, (state, _)) in enumerate(zip(tokens, rows, strict=True))
            if state.params.logprobs is not None
        ]
        if not asks:
            return [Sample(token=token) for token in tokens], bad
        ranked = zip(asks, self._kernels.rank(logits_RV, asks), strict=True)
        logprobs = {row: _record(token, found) for (row, token, _), found in ranked}
        return [
            Sample(token=token, logprobs=logprobs.get(row)) for row, token in enumerate(tokens)
        ], bad

    def rank_prompt(
        self, logits_RV: Tensor, tokens: Sequence[int], top: int
    ) -> list[TokenLogprobs]:
        """How likely each of `tokens` was, given the logits of the position before it."""
        asks = [(row, token, top) for row, token in enumerate(tokens)]
        # A bad row's numbers mean nothing, and nobody sees them: no token follows from it.
        ranked, _ = _without_bad_rows(lambda rows: self._kernels.rank(rows, asks), logits_RV)
        return [_record(token, found) for token, found in zip(tokens, ranked, strict=True)]


def _without_bad_rows(compute: Callable[[Tensor], T], logits_RV: Tensor) -> tuple[T, list[int]]:
    """What comes of all rows, and which of them had no finite logit and count for nothing."""
    try:
        return compute(logits_RV), []
    except NoFiniteLogit:
        best_R = torch.nan_to_num(logits_RV, nan=-torch.inf).amax(dim=-1)
        bad = (~torch.isfinite(best_R)).nonzero().flatten().tolist()
        with torch.inference_mode():
            logits_RV[bad] = 0.0
        return compute(logits_RV), bad


def _record(token: int, ranked: Ranked) -> TokenLogprobs:
    return TokenLogprobs(token=token, logprob=ranked.logprob, rank=ranked.rank, top=ranked.top)


def _penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


def _bias(params: SamplingParams) -> tuple[Tensor, Tensor] | None:
    if not params.logit_bias:
        return None
    merged = dict(params.logit_bias)  # a token named twice keeps its last value
    return torch.tensor(list(merged)), torch.tensor(list(merged.values()), dtype=torch.float32)
