"""What each quantiser makes of numbers, against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from hanse.codecs import Codec, Sending, int8, kmeans, nf4, sign, ternary, uniform
from hanse.codecs.quantise import NF4, row_sums
from hanse.codecs.wire import FRAME
from hanse.core.layout import Layout

numbers = st.lists(
    st.one_of(
        st.floats(-10, 10, width=32),
        st.floats(-(2.0**-130), 2.0**-130, width=32),
        st.sampled_from([0.0, -0.0, 1.0, -3.0, 1e30, -1e37]),
    ),
    min_size=1,
    max_size=60,
).map(torch.tensor)
ALL = [
    "uniform(8)",
    "uniform(1)",
    "uniform(2, stochastic=True)",
    "int8",
    "int8(7)",
    "nf4",
    "nf4(5)",
    "sign",
    "ternary",
    "kmeans(3)",
]


def through(codec: Codec | str, x: Tensor, seed: int = 0) -> Tensor:
    codec = Codec.parse(codec) if isinstance(codec, str) else codec
    return codec.decode(codec.encode(x, Sending.of(x, seed=seed)))


def many(codec: Codec, x: Tensor, draws: int) -> Tensor:
    return codec.roundtrip(x.expand(draws, -1).clone(), Sending(Layout({"": (len(x),)}), torch.arange(draws))).values


@given(numbers, st.integers(1, 8), st.booleans())
def test_uniform_is_at_most_half_a_step_off_and_a_whole_one_if_stochastic(x: Tensor, bits: int, stochastic: bool) -> None:
    got, wide = through(uniform(bits, stochastic=stochastic), x).double(), x.double()
    step = float(wide.max() - wide.min()) / (2**bits - 1)
    slack = 4 * (2**-23 * float(x.abs().max()) + 2**bits * 2**-149)  # float32's rounding, and that of a subnormal step
    assert float((got - wide).abs().max()) <= step * (1 if stochastic else 0.5) + slack


@given(st.integers(1, 8))
def test_evenly_spaced_numbers_arrive_as_they_are(bits: int) -> None:
    x = torch.arange(2.0**bits) * 0.5 - 3
    assert torch.equal(through(uniform(bits), x), x)


def test_stochastic_rounding_is_right_in_the_mean_and_only_goes_to_neighbours() -> None:
    """Bernoulli between neighbours: at most step / 2 of deviation a draw."""
    x, draws = torch.cat([torch.tensor([0.0, 3.0]), torch.linspace(0.05, 2.95, 20)]), 4000
    got = many(uniform(2, stochastic=True), x, draws)
    assert (got.double().mean(0) - x).abs().max() < 5 * 0.5 / draws**0.5
    assert bool(((got == x.floor()) | (got == x.ceil())).all())
    assert torch.equal(got[:, 0], torch.zeros(draws)) and torch.equal(got[:, 1], torch.full((draws,), 3.0))


@given(numbers, st.one_of(st.none(), st.integers(1, 20)))
def test_int8_is_at_most_half_of_a_127th_of_its_blocks_largest_off(x: Tensor, block: int | None) -> None:
    got = through(int8(block), x)
    for mine, back in zip(x.split(block or len(x)), got.split(block or len(x)), strict=True):
        unit = float(mine.abs().max()) / 127
        assert float((back.double() - mine.double()).abs().max()) <= unit / 2 + 1e-6 * 127 * unit + 2**-148
        assert bool((back[mine == 0] == 0).all())


def test_int8_by_hand() -> None:
    assert through(int8(2), torch.tensor([127.0, -63.4, 0.0, 0.0, -2.0])).tolist() == [127.0, -63.0, 0.0, 0.0, -2.0]


PUBLISHED = """-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0"""


def test_the_levels_of_nf4_are_those_published_and_follow_from_quantiles() -> None:
    """QLoRA, appendix E; by its section 3: quantiles of a normal at evenly spaced shares, for each half, divided by the largest."""
    assert [str(level) for level in NF4] == [text.strip() for text in PUBLISHED.split(",")]
    offset = 0.5 * (1 / 32 + 1 / 30)  # what is cut off at either end: as much as lies between two levels there, halved
    quantile = torch.special.ndtri
    upper = quantile(torch.linspace(1 - offset, 0.5, 9, dtype=torch.float64))[:-1]
    lower = -quantile(torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat([lower, torch.zeros(1), upper.flip(0)]) / upper[0]
    torch.testing.assert_close(levels, torch.tensor(NF4, dtype=torch.float64), rtol=0, atol=2e-4)


@given(numbers, st.integers(1, 20))
def test_nf4_takes_the_nearest_level_of_the_block(x: Tensor, block: int) -> None:
    assume(not bool(((x != 0) & (x.abs() < 1e-36)).any()))
    got, levels = through(nf4(block), x), torch.tensor(NF4, dtype=torch.float64)
    for mine, back in zip(x.double().split(block), got.double().split(block), strict=True):
        scale = mine.abs().max()
        nearest = (mine[:, None] - scale * levels).abs().min(1).values
        assert bool(((back - mine).abs() <= nearest + 1e-6 * scale).all())


@given(numbers)
def test_sign_is_the_sign_times_the_mean_magnitude(x: Tensor) -> None:
    mean = x.double().abs().mean()
    want = torch.where(x >= 0, mean, -mean).float()
    torch.testing.assert_close(through(sign(), x), want, rtol=1e-6, atol=2**-149)


@given(numbers, st.sampled_from([0.0, 0.7, 1.5]))
def test_ternary_is_zero_below_the_threshold_and_else_the_mean_of_what_is_above(x: Tensor, threshold: float) -> None:
    magnitude = x.double().abs()
    limit = threshold * magnitude.mean()
    assume(not bool(((magnitude - limit).abs() <= 1e-6 * limit).any()) or threshold == 0)
    large = magnitude > limit
    mean = magnitude[large].mean() if bool(large.any()) else torch.zeros(())
    torch.testing.assert_close(through(ternary(threshold), x), (x.sign() * large * mean).float(), rtol=1e-6, atol=2**-149)


def squared(x: Tensor, got: Tensor) -> float:
    return float((x.double() - got.double()).square().sum())


moderate = st.lists(st.one_of(st.floats(-10, 10, width=32), st.sampled_from([0.0, 1.0, -3.0])), min_size=1, max_size=60).map(
    torch.tensor
)


@given(moderate, st.integers(2, 40))
def test_kmeans_is_never_worse_than_one_mean_for_each_sign(x: Tensor, centres: int) -> None:
    means = torch.zeros_like(x)
    for half in (x < 0, x >= 0):
        if bool(half.any()):
            means[half] = x[half].double().mean().float()
    assert squared(x, through(kmeans(centres), x)) <= squared(x, means) * (1 + 1e-5) + 1e-8


@given(moderate, st.integers(1, 40))
def test_twice_the_centres_are_never_worse(x: Tensor, centres: int) -> None:
    assert squared(x, through(kmeans(2 * centres), x)) <= squared(x, through(kmeans(centres), x)) * (1 + 1e-5) + 1e-8


@given(numbers, st.integers(0, 3))
def test_kmeans_is_exact_with_a_centre_for_each_number(x: Tensor, more: int) -> None:
    """However far apart the numbers are."""
    got = through(kmeans(max(1, len(x.unique())) + more), x)
    torch.testing.assert_close(got, x, rtol=2e-7, atol=0)


def test_one_centre_is_the_mean_and_two_may_find_far_apart_clusters() -> None:
    x = torch.tensor([1.0, 1.2, 9.0, 9.2])
    assert torch.allclose(through(kmeans(1), x), torch.full((4,), 5.1))
    assert torch.allclose(through(kmeans(2), x), torch.tensor([1.1, 1.1, 9.1, 9.1]))


@pytest.mark.parametrize(("to", "bits"), [("bfloat16", 8), ("float16", 11)])
@given(st.lists(st.floats(2**-6, 100, width=32), min_size=1, max_size=20).map(torch.tensor))
def test_cast_rounds_to_the_nearest(to: str, bits: int, x: Tensor) -> None:
    got = through(f"cast('{to}')", x)
    assert torch.equal(got, x.to(getattr(torch, to)).float()) and bool(((got - x).abs() <= x * 2.0**-bits).all())


@pytest.mark.parametrize("text", ["uniform(8)", "uniform(3, stochastic=True)"])
def test_a_range_that_overflows_makes_numbers_travel_as_they_are(text: str) -> None:
    top = torch.finfo(torch.float32).max
    for row in ([-top, 0.0, top], [-0.6 * top, 0.5 * top, 0.3], [top, 0.0, -top / 2]):
        x = torch.tensor(row)
        assert torch.equal(through(text, x), x) and len(Codec.parse(text).encode(x)) == FRAME.size + 1 + 12


@pytest.mark.parametrize("text", ALL)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30).map(torch.tensor))
def test_what_is_finite_arrives_finite(text: str, x: Tensor) -> None:
    """However large: within the range of the numbers, or of their magnitudes."""
    got = through(text, x)
    assert bool(torch.isfinite(got).all())
    assert float(got.double().abs().max()) <= float(x.double().abs().max()) * (1 + 1e-5) + 2.0**-140


@pytest.mark.parametrize("text", ALL)
def test_one_number_none_and_all_the_same(text: str) -> None:
    assert len(through(text, torch.zeros(0))) == 0
    for x in (torch.tensor([-0.3]), torch.full((70,), 2.5), torch.zeros(70), torch.tensor([1e-45]), torch.tensor([-3e38])):
        torch.testing.assert_close(through(text, x), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", ALL)
@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.float64]))
def test_a_thousandth_of_the_numbers_is_as_good(text: str, seed: int, dtype: torch.dtype) -> None:
    """Scaling by a power of two scales what arrives, and nothing else."""
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    assert torch.equal(through(text, x / 1024), through(text, x) / 1024)


@given(st.integers(0, 5000), st.integers(1, 4))
def test_sums_of_rows_do_not_depend_on_the_rows_beside(count: int, clients: int) -> None:
    rows = torch.randn(clients, count, generator=torch.Generator().manual_seed(count))
    sums = row_sums(rows)
    assert all(torch.equal(row_sums(row[None])[0], one) for row, one in zip(rows, sums, strict=True))
    assert all(math.isclose(math.fsum(row.tolist()), float(one), abs_tol=1e-10) for row, one in zip(rows, sums, strict=True))
