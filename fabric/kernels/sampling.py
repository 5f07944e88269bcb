"""Next tokens out of logits: greedy, filtered sampling, log-probabilities, penalties.

What a draw means (both implementations agree on it):

1. z = logit / temperature; below a temperature of 1e-5 the likeliest token is taken.
2. Filters, each on what the one before left: min_p (probability at least min_p times the largest;
   Nguyen et al. 2024), top_k, top_p (the smallest set of likeliest tokens that holds top_p of
   the mass; Holtzman et al. 2020). Equal logits rank by id, the lowest first.
3. One uniform number u in [0, 1), `uniform(seed, choice, position)`, picks the first token, in
   order of id, at which the running probability passes u (inverse-CDF sampling).

A NaN logit counts as -inf. So a token is a function of its row of logits and of (seed, choice,
position), of nothing else.

Shape legend: R rows of logits, V vocab.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # a colder temperature is greedy


class Draw(NamedTuple):
    """One row to draw from. `top_k` 0, `top_p` 1, `min_p` 0 are off. The C++ struct, in order."""

    row: int
    seed: int  # [0, 2^64)
    choice: int
    position: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int


class Ranked(NamedTuple):
    """A token's natural log-probability, its rank (1: likeliest), and the likeliest tokens, each
    with its own."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class NoFiniteLogit(ArithmeticError):
    """A row of logits is all NaN or infinite: the weights are broken."""


class TorchSampling:
    """The reference: a full sort, in float64."""

    def greedy(self, logits_RV: Tensor) -> list[int]:
        """The likeliest token of every row, the lowest id of equals."""
        _require_finite(logits_RV)
        return _tokens(_clean(logits_RV).argmax(dim=-1))

    def draw(self, logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
        """One token an entry; see the head of this file."""
        device = logits_RV.device
        rows_RV = logits_RV[torch.tensor([draw.row for draw in draws], device=device)]
        _require_finite(rows_RV)
        rows_RV = _clean(rows_RV).double()

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

        warm = [
            draw if draw.temperature >= GREEDY_BELOW else draw._replace(temperature=1.0, top_k=1)
            for draw in draws
        ]
        temperature_R1 = column([draw.temperature for draw in warm])
        kept_RV = support(
            rows_RV / temperature_R1,
            min_p_R1=column([draw.min_p for draw in draws]),
            top_k_R1=column([draw.top_k for draw in warm]),
            top_p_R1=column([draw.top_p for draw in draws]),
        )
        scaled_RV = (rows_RV / temperature_R1).masked_fill(~kept_RV, -torch.inf)
        running_RV = torch.softmax(scaled_RV, dim=-1).cumsum(dim=-1)
        noise_R1 = column([uniform(draw.seed, draw.choice, draw.position) for draw in draws])
        target_R1 = noise_R1 * running_RV[:, -1:]
        return _tokens((running_RV > target_R1).int().argmax(dim=-1))

    def rank(self, logits_RV: Tensor, asks: Sequence[tuple[int, int, int]]) -> list[Ranked]:
        """Log-probability, rank and the likeliest tokens, one row at a time."""
        results = []
        for row, token, top in asks:
            logits_V = _clean(logits_RV[row])
            _require_finite(logits_V[None])
            logprobs_V = torch.log_softmax(logits_V.double(), dim=-1)
            chosen = logits_V[token]
            rank = 1 + int((logits_V > chosen).sum()) + int((logits_V[:token] == chosen).sum())
            order = torch.sort(logits_V, descending=True, stable=True).indices[:top]
            likeliest = zip(_tokens(order), logprobs_V[order].tolist(), strict=True)
            results.append(Ranked(float(logprobs_V[token]), rank, tuple(likeliest)))
        return results


def support(scaled_RV: Tensor, *, min_p_R1: Tensor, top_k_R1: Tensor, top_p_R1: Tensor) -> Tensor:
    """Which tokens may be drawn, bool [R, V]: min_p, then top_k, then top_p.

    `scaled_RV`: logits / temperature."""
    order = torch.sort(scaled_RV, dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled_RV.shape[-1], device=scaled_RV.device)
    relative_RV = (order.values - order.values[:, :1]).exp()
    kept_RV = relative_RV >= min_p_R1
    kept_RV &= (top_k_R1 <= 0) | (rank_V < top_k_R1)
    mass_RV = torch.where(kept_RV, relative_RV, 0.0)
    before_RV = mass_RV.cumsum(dim=-1) - mass_RV
    kept_RV &= (top_p_R1 >= 1.0) | (before_RV < top_p_R1 * mass_RV.sum(dim=-1, keepdim=True))
    kept_RV[:, 0] = True
    return torch.zeros_like(kept_RV).scatter_(-1, order.indices, kept_RV)


class CpuSampling:
    """The C++ twin (`cpu/sampling.cpp`): no full sort, no temporaries, one row after the other."""

    _DRAW = numpy.dtype(
        [
            ("row", "i8"),
            ("seed", "u8"),
            ("choice", "u4"),
            ("position", "u4"),
            ("temperature", "f4"),
            ("top_p", "f4"),
            ("min_p", "f4"),
            ("top_k", "i4"),
        ]
    )
    _ASK = numpy.dtype([("row", "i8"), ("offset", "i8"), ("token", "i4"), ("top", "i4")])

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._greedy = library.fabric_greedy
        self._greedy.argtypes = [pointer, integer, integer, integer, pointer]
        self._greedy.restype = integer
        self._sample = library.fabric_sample
        self._sample.argtypes = [pointer, integer, integer, pointer, integer, pointer]
        self._sample.restype = integer
        self._logprobs = library.fabric_logprobs
        self._logprobs.argtypes = [pointer, integer, integer, pointer, integer, *[pointer] * 4]
        self._logprobs.restype = integer
        self._known_RV: Tensor | None = None
        self._known_place = (0, 0, 0, 0)
        self._tokens = (integer * 1024)()  # as many as one call answers; longer ones get their own

    def greedy(self, logits_RV: Tensor) -> list[int]:
        """The likeliest token of every row, the lowest id of equals."""
        if logits_RV is not self._known_RV:  # an executor's buffer comes again in the next step
            self._known_RV = logits_RV
            self._known_place = (*_place(logits_RV), len(logits_RV))
        rows = self._known_place[3]
        tokens = self._room(rows)
        _require(self._greedy(*self._known_place, tokens))
        return tokens[:rows]

    def draw(self, logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
        """One token an entry; see the head of this file."""
        rows = len(logits_RV)
        assert all(0 <= draw.row < rows for draw in draws)
        entries = numpy.array(draws, dtype=self._DRAW)
        tokens = self._room(len(draws))
        _require(self._sample(*_place(logits_RV), entries.ctypes.data, len(draws), tokens))
        return tokens[: len(draws)]

    def rank(self, logits_RV: Tensor, asks: Sequence[tuple[int, int, int]]) -> list[Ranked]:
        """Log-probability, rank and the likeliest tokens of each (row, token, top)."""
        rows, vocab = logits_RV.shape
        entries, offset = [], 0
        for row, token, top in asks:
            assert 0 <= row < rows and 0 <= token < vocab
            entries.append((row, offset, token, min(top, vocab)))
            offset += min(top, vocab)
        packed = numpy.array(entries, dtype=self._ASK)
        logprobs, top_logprobs = numpy.empty(len(asks)), numpy.empty(offset)
        ranks, top_tokens = numpy.empty(len(asks), "i8"), numpy.empty(offset, "i8")
        outputs = (array.ctypes.data for array in (logprobs, ranks, top_tokens, top_logprobs))
        _require(self._logprobs(*_place(logits_RV), packed.ctypes.data, len(asks), *outputs))
        pairs = list(zip(top_tokens.tolist(), top_logprobs.tolist(), strict=True))
        return [
            Ranked(logprob, rank, tuple(pairs[first : first + top]))
            for logprob, rank, (_, first, _, top) in zip(
                logprobs.tolist(), ranks.tolist(), entries, strict=True
            )
        ]

    def _room(self, count: int) -> ctypes.Array[ctypes.c_int64]:
        return self._tokens if count <= 1024 else (ctypes.c_int64 * count)()


def penalise(
    logits_V: Tensor,
    *,
    seen: Tensor,
    counts: Tensor,
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """Edits one row in place, only where a token was seen.

    `seen`: int64 ids of prompt and output, each once; `counts`: how often each is in the output.
    Repetition (Keskar et al. 2019, CTRL) divides positive and multiplies negative logits of all of
    them; frequency and presence (OpenAI's API) are subtracted for tokens of the output.
    """
    values = logits_V[seen]
    if repetition != 1.0:
        values = torch.where(values > 0, values / repetition, values * repetition)
    if frequency != 0.0 or presence != 0.0:
        times = counts.to(values.dtype)
        values = values - (frequency * times + presence * (times > 0))
    logits_V[seen] = values


def uniform(seed: int, choice: int, position: int) -> float:
    """The noise of one token, in [0, 1), 53 bits.

    Philox4x32-10 with the seed as its key and (position, choice) as its counter:
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = position & mask, choice & mask, 0, 0
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (second >> 32) ^ c1 ^ k0, second & mask
        c2, c3 = (first >> 32) ^ c3 ^ k1, first & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return float(((c0 << 32) | c1) >> 11) * 2.0**-53


def _clean(logits_RV: Tensor) -> Tensor:
    return torch.nan_to_num(logits_RV, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _require_finite(logits_RV: Tensor) -> None:
    best_R = _clean(logits_RV).amax(dim=-1)
    bad_R = ~torch.isfinite(best_R)
    _require(int(bad_R.int().argmax()) if bool(bad_R.any()) else -1)


def _require(bad_row: int) -> None:
    if bad_row >= 0:
        raise NoFiniteLogit(f"row {bad_row} of the logits has no finite value")


def _place(logits_RV: Tensor) -> tuple[int, int, int]:
    """(address, stride, vocab): how every C++ function takes logits."""
    stride, step = logits_RV.stride()
    assert logits_RV.dtype == torch.float32 and step == 1 and logits_RV.device.type == "cpu"
    return logits_RV.data_ptr(), stride, logits_RV.shape[1]


def _tokens(ids: Tensor) -> list[int]:
    tokens: list[int] = ids.tolist()
    return tokens
