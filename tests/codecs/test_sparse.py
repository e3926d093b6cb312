"""Which entries are sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hanse.codecs import Codec, Sending, randomk, threshold, topk
from hanse.codecs.sparse import LONG, largest, words
from hanse.core.errors import ConfigError
from hanse.core.layout import Layout

LAYOUT = Layout({"head.weight": (5, 4), "body.weight": (10, 10), "body.bias": (10,)})


def plainly(row: Tensor, k: int) -> Tensor:
    """The k largest magnitudes, of equals the first, by sorting."""
    return row.abs().sort(descending=True, stable=True).indices[:k].sort().values


def sent(text: str | Codec, rows: Tensor, layout: Layout | None = None, **more: object) -> Tensor:
    codec = Codec.parse(text) if isinstance(text, str) else text
    sending = Sending(layout or Layout({"": (rows.shape[1],)}), torch.arange(len(rows)), **more)
    return codec.roundtrip(rows.clone(), sending).values


few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0])
rows_of_ties = st.lists(st.one_of(few, st.floats(-10, 10, width=32)), min_size=1, max_size=60).map(torch.tensor)


@given(rows_of_ties, st.integers(0, 60))
def test_the_largest_are_those_of_a_stable_sort(row: Tensor, k: int) -> None:
    k = min(k, len(row))
    assert torch.equal(largest(row[None], k)[0], plainly(row, k))


@given(rows_of_ties, st.sampled_from([0.01, 0.1, 0.3, 0.5, 1.0]))
def test_topk_keeps_a_fraction_rounded_down_but_at_least_one(row: Tensor, fraction: float) -> None:
    got = topk(fraction).decode(topk(fraction).encode(row))
    kept = plainly(row, max(1, int(fraction * len(row) + 1e-9)))
    assert torch.equal(got, torch.zeros_like(row).scatter(0, kept, row[kept]))


N = LONG + 1000
place = np.arange(N)
ADVERSARIAL = {
    "all equal": np.ones(N),
    "all zero": np.zeros(N),
    "rising": place / N,
    "falling": place[::-1] / N,
    "periodic, in step with the sample": (place % (N // 8192) == 0).astype(float),
    "large where the sample does not look": (place % (N // 8192) == 1).astype(float),
    "one spike": (place == 70_000 % N) * 5.0,
    "two values": np.where(place % 1000 == 0, -2.0, 1.0),
    "heavy tail": np.random.default_rng(0).standard_cauchy(N),
    "mostly zero": np.random.default_rng(1).standard_normal(N) * (np.random.default_rng(2).random(N) < 0.001),
    "subnormal": np.random.default_rng(3).standard_normal(N) * 1e-42,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", ADVERSARIAL)
def test_long_rows_are_searched_as_exactly(what: str, dtype: torch.dtype) -> None:
    row = torch.from_numpy(ADVERSARIAL[what].copy()).to(dtype)
    for k in (1, 2, N // 100, N // 4, N // 4 + 1, N - 1, N):
        assert torch.equal(largest(row[None], k)[0], plainly(row, k)), k


@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.integers(1, 4))
def test_long_rows_with_ties_everywhere(seed: int, k: int, values: int) -> None:
    rows = torch.randint(-values, values + 1, (2, LONG), generator=torch.Generator().manual_seed(seed)).float()
    for got, row in zip(largest(rows, k), rows, strict=True):
        assert torch.equal(got, plainly(row, k))


def test_every_client_sends_the_share_it_was_allotted() -> None:
    rows = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    share = torch.tensor([0.0, 0.05, 0.5, 1.0], dtype=torch.float64)
    codec = topk(0.1)
    found = codec.roundtrip(rows.clone(), Sending(Layout({"": (100,)}), torch.arange(4), share))
    for i, k in enumerate([1, 5, 50, 100]):
        at = plainly(rows[i], k)
        assert torch.equal(found.values[i], torch.zeros(100).scatter(0, at, rows[i][at]))
        alone = Sending(Layout({"": (100,)}), torch.tensor([i]), share[i : i + 1])
        data = codec.encode(rows[i], alone)
        assert len(data) == int(found.sizes[i]) == 16 + 1 + 8 * k and torch.equal(codec.decode(data), found.values[i])


def test_layers_that_match_a_pattern_have_a_share_of_their_own() -> None:
    rows = torch.randn(3, LAYOUT.size, generator=torch.Generator().manual_seed(0))
    got = sent("layers | topk(0.2, only={'head.*': 1, '*.bias': 0.5, '*': 0.1})", rows, LAYOUT)
    assert [(v != 0).sum(-1).flatten(1).sum(1).tolist() for v in LAYOUT.views(got[:, None]).values()] == [
        [20] * 3,
        [10] * 3,
        [5] * 3,
    ]
    with pytest.raises(ConfigError, match=r"only: 'nothing' matches no layer; there are: head.weight, body.weight, body.bias"):
        sent("layers | topk(0.2, only={'nothing': 1})", rows, LAYOUT)
    with pytest.raises(ConfigError, match=r"only names layers, write layers \| "):
        Codec.parse("topk(0.2, only={'head.*': 1}) | sign")
    with pytest.raises(ConfigError, match="only"):
        topk(only={"a": 2})


@pytest.mark.parametrize("relative", [False, True])
@given(rows_of_ties, st.floats(0.01, 5))
def test_threshold_keeps_what_reaches_it(relative: bool, row: Tensor, value: float) -> None:
    got = threshold(value, relative=relative).decode(threshold(value, relative=relative).encode(row))
    limit = value * float(row.double().pow(2).mean().sqrt()) if relative else value
    close = (row.abs().double() - limit).abs() <= 1e-6 * limit
    kept = row.abs().double() >= limit
    assert torch.equal(torch.where(close, 0, got), torch.where(kept & ~close, row, 0))


def test_a_threshold_is_reached_by_equality_and_may_let_nothing_through() -> None:
    rows = torch.tensor([[1.0, -1.0, 0.5, 2.0], [0.1, 0.2, 0.3, 0.4], [3.0, 3.0, 3.0, 3.0]])
    assert torch.equal(sent("threshold(1)", rows), torch.tensor([[1.0, -1.0, 0, 2.0], [0, 0, 0, 0], [3.0] * 4]))
    assert torch.equal(sent("threshold(1, relative=True)", rows)[2], rows[2])


def test_randomk_sends_the_same_places_for_the_same_seed_and_others_for_others() -> None:
    x = torch.ones(2, 1000)
    layout = Layout({"": (1000,)})
    one, again, other = (randomk(0.1).roundtrip(x, Sending(layout, torch.tensor(s))).values for s in ([1, 1], [1, 5], [2, 2**62]))
    assert torch.equal(one[0], one[1]) and torch.equal(one[0], again[0])
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[0], again[1])
    assert set(one.sum(1).tolist()) == {100.0}


def test_layers_draw_different_places() -> None:
    layout = Layout({"a": (1000,), "b": (1000,)})
    got = sent("layers | randomk(0.1)", torch.ones(1, 2000), layout)[0]
    assert not torch.equal(got[:1000], got[1000:]) and got[:1000].sum() == got[1000:].sum() == 100


def test_randomk_is_unbiased_in_the_mean_over_seeds() -> None:
    """Every entry is kept with probability k/n and then scaled by n/k: variance x^2 (n/k - 1) a draw, here within 5 deviations."""
    x, draws = torch.linspace(-3, 3, 30), 4000
    got = randomk(0.2, unbiased=True).roundtrip(x.expand(draws, -1), Sending(Layout({"": (30,)}), torch.arange(draws))).values
    error = (got.double().mean(0) - x) / (x.abs() * (4 / draws) ** 0.5)
    assert error.abs().max() < 5 and bool(((got == 0) | ((got - 5 * x).abs() < 1e-5)).all())
    plain = randomk(0.2).roundtrip(x.expand(draws, -1), Sending(Layout({"": (30,)}), torch.arange(draws))).values
    assert torch.equal(5 * plain, got)


def test_random_words_are_uniform() -> None:
    drawn = words(torch.arange(4) * 2**33, "a.weight", 10_000).double() / 2**32
    assert drawn.shape == (4, 10_000) and bool(((drawn >= 0) & (drawn < 1)).all())
    assert (drawn.mean(1) - 0.5).abs().max() < 5 * (1 / 12 / 10_000) ** 0.5
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.05


def test_what_was_sent_is_told_and_a_zero_that_was_sent_counts() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 5.0, 0.0, 0.0], [torch.nan, 0.0, 0.0, 0.0]])
    sending = Sending(Layout({"": (4,)}), torch.arange(3), masks=True)
    kept = topk(0.5).roundtrip(rows.clone(), sending).kept
    assert kept is not None and kept.tolist() == [[True, False, False, True], [True, True, False, False], [True] * 4]
    kept = Codec.parse("threshold(1) | sign").roundtrip(rows.clone(), sending).kept
    assert kept is not None and kept.tolist() == [[False, False, False, True], [False, True, False, False], [True] * 4]
    assert topk(0.5).roundtrip(rows.clone(), Sending(Layout({"": (4,)}), torch.arange(3))).kept is None


def test_masks_of_layers_and_of_shares() -> None:
    rows = torch.randn(2, LAYOUT.size)
    share = torch.tensor([0.1, 0.5], dtype=torch.float64)
    kept = Codec.parse("layers | topk").roundtrip(rows.clone(), Sending(LAYOUT, torch.arange(2), share, masks=True)).kept
    assert kept is not None and [part.sum(1).tolist() for part in kept.split([20, 100, 10], 1)] == [[2, 10], [10, 50], [1, 5]]


def test_randomk_is_a_mask_too() -> None:
    rows = torch.zeros(3, 50)
    kept = randomk(0.1).roundtrip(rows, Sending(Layout({"": (50,)}), torch.arange(3), masks=True)).kept
    ones = randomk(0.1).roundtrip(rows + 1, Sending(Layout({"": (50,)}), torch.arange(3))).values
    assert kept is not None and torch.equal(kept, ones == 1)
