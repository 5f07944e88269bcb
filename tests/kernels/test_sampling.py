"""`kernels/sampling.py`: the C++ twin against the reference, and both against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.cpp import without_cpp
from torch import Tensor

from fabric.kernels.cpu.build import BuildError
from fabric.kernels.sampling import (
    CpuSampling,
    Draw,
    NoFiniteLogit,
    TorchSampling,
    penalise,
    support,
    uniform,
)
from fabric.kernels.sampling_kernels import SamplingKernels, create_sampling

REFERENCE = TorchSampling()


@pytest.fixture(scope="module")
def twin() -> SamplingKernels:
    kernels = create_sampling(torch.device("cpu"))
    if not isinstance(kernels, CpuSampling):
        without_cpp("sampling runs in torch")
    return kernels


@pytest.fixture(scope="module", params=["torch", "C++"])
def kernels(request: pytest.FixtureRequest) -> SamplingKernels:
    if request.param == "torch":
        return REFERENCE
    found: SamplingKernels = request.getfixturevalue("twin")
    return found


def logits_of(seed: int, rows: int, vocab: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def a_draw(row: int = 0, seed: int = 0, position: int = 0, **changes: float) -> Draw:
    plain = Draw(row, seed, 0, position, temperature=1.0, top_p=1.0, min_p=0.0, top_k=0)
    return plain._replace(**changes)


def test_noise_is_philox() -> None:
    """A known answer of Random123: philox4x32-10 of key and counter zero begins like this."""
    assert uniform(0, 0, 0) == ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) * 2.0**-53


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20), st.integers(0, 2**31))
def test_both_have_the_same_noise(seed: int, choice: int, position: int) -> None:
    try:
        from fabric.kernels.cpu.build import load_library

        library = load_library()
    except BuildError:
        without_cpp("sampling runs in torch")
    import ctypes

    kind = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32)
    assert kind(("fabric_uniform", library))(seed, choice, position) == uniform(
        seed, choice, position
    )


def test_noise_is_uniform_and_each_argument_matters() -> None:
    """Mean of 3 x 4,000 numbers: standard deviation 0.0046; 0.02 is more than four of them."""
    series = (
        [uniform(seed, 0, 0) for seed in range(4000)],
        [uniform(7, choice, 0) for choice in range(4000)],
        [uniform(7, 0, position) for position in range(4000)],
    )
    for numbers in series:
        assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02
        assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("vocab", [1, 15, 64, 65, 1000, 49_152])
def test_greedy(kernels: SamplingKernels, vocab: int) -> None:
    logits = logits_of(vocab, 5, vocab)
    assert kernels.greedy(logits) == logits.argmax(dim=-1).tolist()
    cold = [a_draw(row, temperature=0.0) for row in range(5)]
    assert kernels.draw(logits, cold) == logits.argmax(dim=-1).tolist()


def test_ties_go_to_the_lowest_id(kernels: SamplingKernels) -> None:
    logits = torch.zeros(2, 300)
    logits[1, [70, 200, 299]] = 5.0
    assert kernels.greedy(logits) == [0, 70]
    top = [a_draw(1, seed, top_k=2) for seed in range(50)]
    assert set(kernels.draw(logits, top)) == {70, 200}
    nucleus = [a_draw(0, seed, top_p=0.01) for seed in range(50)]
    assert set(kernels.draw(logits, nucleus)) == {0, 1, 2}
    assert kernels.rank(logits, [(1, 200, 4)])[0].rank == 2
    assert [token for token, _ in kernels.rank(logits, [(1, 200, 4)])[0].top] == [70, 200, 299, 0]


FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.05, 0.7, 1.0, 1.9, 50.0]),
        "top_p": st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.001, 0.2, 1.0]),
        "top_k": st.sampled_from([0, 1, 7, 60, 5000]),
    }
)


@given(
    filters=FILTERS,
    vocab=st.sampled_from([3, 64, 777, 4096]),
    spread=st.sampled_from([0.0, 0.01, 2.0, 30.0]),
    masked=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_twin_draws_what_the_reference_draws(
    twin: SamplingKernels,
    filters: dict[str, float],
    vocab: int,
    spread: float,
    masked: bool,
    seed: int,
) -> None:
    """Equal tokens; where rounding (float32 against float64) decides, a neighbour in the
    cumulative distribution: its edge lies within 1e-5 of the noise."""
    logits = logits_of(seed, 4, vocab, spread)
    if masked:
        logits[:, ::2] = -torch.inf
        logits[:, 0] = 1.0
    draws = [a_draw(row, seed + row, row, **filters) for row in range(4)]
    ours, theirs = twin.draw(logits, draws), REFERENCE.draw(logits, draws)
    for draw, token, expected in zip(draws, ours, theirs, strict=True):
        if token != expected:
            assert near_an_edge(logits[draw.row], draw, token), (draw, token, expected)


def near_an_edge(logits_V: Tensor, draw: Draw, token: int) -> bool:
    """Could a relative error of 1e-5 in the weights turn this draw into `token`?"""
    scaled = logits_V.double() / draw.temperature
    noise = uniform(draw.seed, draw.choice, draw.position)
    for top_p in (draw.top_p, draw.top_p * (1 - 1e-5), min(1.0, draw.top_p * (1 + 1e-5))):
        kept = support(
            scaled[None],
            min_p_R1=torch.tensor([[draw.min_p * (1 - 1e-5)]], dtype=torch.float64),
            top_k_R1=torch.tensor([[draw.top_k]]),
            top_p_R1=torch.tensor([[top_p]], dtype=torch.float64),
        )[0]
        running = torch.softmax(scaled.masked_fill(~kept, -torch.inf), -1).cumsum(-1)
        low = float(running[token - 1]) if token else 0.0
        if bool(kept[token]) and low - 1e-5 <= noise <= float(running[token]) + 1e-5:
            return True
    return False


@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.6}, {"top_p": 0.8}, {"top_k": 6}, {"min_p": 0.1}],
    ids=["plain", "cold", "top_p", "top_k", "min_p"],
)
def test_the_distribution(kernels: SamplingKernels, filters: dict[str, float]) -> None:
    """Chi-square of 4,000 draws over what may be drawn. The bound is the 99.99th percentile
    (Wilson and Hilferty's approximation); seeds are fixed, so it passes or fails for ever."""
    logits = logits_of(3, 1, 24, spread=1.5)
    settings = a_draw(**filters)
    draws = [a_draw(0, seed, 5, **filters) for seed in range(4000)]
    counts = torch.bincount(torch.tensor(kernels.draw(logits, draws)), minlength=24)
    kept = support(
        logits.double() / settings.temperature,
        min_p_R1=torch.tensor([[settings.min_p]]),
        top_k_R1=torch.tensor([[settings.top_k]]),
        top_p_R1=torch.tensor([[settings.top_p]]),
    )[0]
    weights = (logits[0].double() / settings.temperature).exp() * kept
    expected = 4000 * weights / weights.sum()
    assert counts[~kept].sum() == 0
    chi_square = float(((counts - expected) ** 2 / expected)[kept].sum())
    freedom = int(kept.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < bound


def test_supports_by_hand() -> None:
    """0.5, 0.25, 0.15, 0.1: each filter, and what they leave each other."""
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()[None]

    def kept(min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> list[int]:
        mask = support(
            logits.double(),
            min_p_R1=torch.tensor([[min_p]]),
            top_k_R1=torch.tensor([[top_k]]),
            top_p_R1=torch.tensor([[top_p]], dtype=torch.float64),
        )
        return mask[0].nonzero()[:, 0].tolist()

    assert kept(top_k=2) == [1, 3]
    assert kept(min_p=0.25) == [1, 2, 3]
    assert kept(top_p=0.5) == [1]
    assert kept(top_p=0.51) == [1, 3]
    assert kept(top_p=0.8) == [1, 2, 3]
    assert kept(top_k=2, top_p=0.6) == [1], "top_p counts within what top_k left: 0.5 is 0.67"
    assert kept(top_p=0.0) == [1], "something always stays"


def test_rows_do_not_know_each_other(twin: SamplingKernels) -> None:
    """The same row in any batch, at any address, gives the same token and log-probability."""
    logits = logits_of(9, 33, 1001)  # odd: rows lie at all alignments
    filters = [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.02}, {"temperature": 0.0}]
    draws = [a_draw(row, row, **filters[row % 5]) for row in range(33)]
    together = twin.draw(logits, draws)
    ranked = twin.rank(logits, [(row, token, 3) for row, token in enumerate(together)])
    for row in range(33):
        alone = logits[row : row + 1].clone()
        assert twin.draw(alone, [draws[row]._replace(row=0)]) == [together[row]]
        assert twin.rank(alone, [(0, together[row], 3)]) == [ranked[row]]


def test_rows_may_lie_apart(twin: SamplingKernels) -> None:
    """An executor pads its rows; what lies between them is not read."""
    padded = torch.full((3, 128), torch.inf)
    padded[:, :100] = logits_of(4, 3, 100)
    logits = padded[:, :100]
    dense = logits.contiguous()
    draws = [a_draw(row, row, top_p=0.9) for row in range(3)]
    assert twin.greedy(logits) == twin.greedy(dense)
    assert twin.draw(logits, draws) == twin.draw(dense, draws)
    asks = [(row, 99, 100) for row in range(3)]
    assert twin.rank(logits, asks) == twin.rank(dense, asks)


def test_ranks_and_logprobs(kernels: SamplingKernels) -> None:
    logits = logits_of(6, 3, 5000)
    expected = torch.log_softmax(logits.double(), dim=-1)
    asks = [(0, 17, 0), (2, 4999, 20), (1, 0, 3)]
    for (row, token, top), found in zip(asks, kernels.rank(logits, asks), strict=True):
        assert found.logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
        assert found.rank == 1 + int((logits[row] > logits[row, token]).sum())
        best = torch.topk(logits[row], top)
        assert [token for token, _ in found.top] == best.indices.tolist()
        values = expected[row, best.indices].tolist()
        assert [value for _, value in found.top] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_row_without_a_finite_logit(kernels: SamplingKernels, value: float) -> None:
    logits = torch.zeros(2, 70)
    logits[1] = value
    for act in (
        lambda: kernels.greedy(logits),
        lambda: kernels.draw(logits, [a_draw(0), a_draw(1)]),
        lambda: kernels.rank(logits, [(1, 3, 2)]),
    ):
        with pytest.raises(NoFiniteLogit):
            act()


@pytest.mark.parametrize("vocab", [5, 70, 4096])
def test_nan_counts_as_minus_infinity(kernels: SamplingKernels, vocab: int) -> None:
    """Few, many and nearly all logits NaN: the same as -inf, whatever is asked."""
    broken = logits_of(vocab, 3, vocab)
    broken[0, 1] = math.nan
    broken[1, ::2] = math.nan
    broken[2, 1:-1] = broken[2, 0] = math.nan
    clean = broken.nan_to_num(nan=-math.inf)
    filters = [{}, {"top_p": 0.9}, {"top_k": 3}, {"top_k": vocab - 1}, {"min_p": 0.02}]
    draws = [
        a_draw(row, seed, **chosen) for row in range(3) for chosen in filters for seed in range(8)
    ]
    asks = [(row, token, vocab) for row in range(3) for token in (0, 1, vocab - 1)]
    asks += [(row, 0, 2) for row in range(3)]
    assert kernels.greedy(broken) == kernels.greedy(clean)
    assert kernels.draw(broken, draws) == kernels.draw(clean, draws)
    ranked = kernels.rank(broken, asks)
    assert ranked == kernels.rank(clean, asks)
    for row, (_, _, top) in zip(asks, ranked, strict=True):
        assert sorted(token for token, _ in top) == list(range(vocab)) or row[2] == 2
    assert ranked[0].rank <= vocab - 1
    assert ranked[1].logprob == -math.inf and ranked[1].rank == vocab


def test_penalties_touch_what_was_seen_and_nothing_else() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 4.0])
    penalise(
        logits,
        seen=torch.tensor([0, 1, 3]),
        counts=torch.tensor([0, 2, 1]),
        repetition=2.0,
        frequency=0.5,
        presence=0.25,
    )
    assert logits.tolist() == [1.0, -4.0 - 1.25, 1.0, 2.0 - 0.75]
