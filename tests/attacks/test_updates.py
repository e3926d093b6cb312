"""Liars that change the update they computed."""

from __future__ import annotations

import math

import pytest
import torch
from cohorts import cohorts, forged, rows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hanse.attacks import drop, gaussian, inversion, random, rescale, scaled, sign_flip, sign_random
from hanse.attacks.updates import SMALLEST

N = 100_000
ONE = torch.tensor([True])


@given(cohorts(), st.floats(0.01, 100))
def test_sign_flip_and_scaled_multiply(cohort: tuple[Tensor, Tensor], scale: float) -> None:
    values, lies = cohort
    assert torch.equal(forged(sign_flip(scale), values, lies)[lies], -scale * values[lies])
    assert torch.equal(forged(scaled(scale), values, lies)[lies], scale * values[lies])


def test_sign_flip_is_mild_by_default_and_twice_is_nothing() -> None:
    values = rows(2, 30)
    lies = torch.tensor([True, True])
    assert torch.equal(forged("sign_flip", values, lies), -values)
    assert torch.equal(forged("sign_flip", forged("sign_flip", values, lies), lies), values)


def test_normal_noise_stands_in_for_the_update() -> None:
    a, b = (forged(random(scale=2), torch.full((1, N), fill), ONE)[0] for fill in (0.0, 1e9))
    assert torch.equal(a, b)  # nothing of the update is left
    assert abs(float(a.mean())) < 2 * 4 / math.sqrt(N) and float(a.std()) == pytest.approx(2, rel=4 / math.sqrt(2 * N))


def test_uniform_noise_shares_a_direction() -> None:
    """Garfield's is all positive: two liars have a cosine of about 3/4, and normal ones of about 0."""
    two, values = torch.tensor([True, True]), torch.zeros(2, N, dtype=torch.float64)
    a, b = forged(random("uniform", 5), values, two)
    assert 0 <= float(a.min()) < 1e-3 and 5 - 1e-3 < float(a.max()) <= 5
    assert float(torch.cosine_similarity(a, b, 0)) == pytest.approx(0.75, abs=0.01)
    assert float(torch.cosine_similarity(*forged(random(), values, two), 0)) == pytest.approx(0, abs=4 / math.sqrt(N))


def test_gaussian_adds_noise_of_the_given_deviation() -> None:
    values = rows(1, N)
    noise = (forged(gaussian(0.1), values, ONE) - values)[0]
    assert abs(float(noise.mean())) < 0.1 * 4 / math.sqrt(N) and float(noise.std()) == pytest.approx(0.1, rel=4 / math.sqrt(2 * N))
    assert abs(float(torch.corrcoef(torch.stack([noise, values[0]]))[0, 1])) < 4 / math.sqrt(N)


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_drop_sets_entries_to_zero_and_leaves_the_others(rate: float) -> None:
    values = rows(1, N)
    sent = forged(drop(rate), values, ONE)
    gone = sent == 0
    assert torch.equal(sent[~gone], values[~gone])
    assert float(gone.double().mean()) == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / N))


def test_inversion_replaces_half_by_reciprocals() -> None:
    values = rows(1, N)
    sent = forged(inversion(), values, ONE)
    kept, turned = sent == values, sent == 1 / values
    assert bool((kept | turned).all())
    assert float(turned.double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(N))
    torch.testing.assert_close(forged(inversion(), sent, ONE), values, rtol=1e-15, atol=0)  # the same half again


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inversion_of_nothing_is_nothing_and_never_infinite(dtype: torch.dtype) -> None:
    tiny = torch.tensor([0.0, -0.0, 1e-38, -1e-38, SMALLEST, -SMALLEST / 10], dtype=dtype).repeat(50)[None]
    sent = forged(inversion(), tiny, ONE)
    assert bool((sent[tiny == 0] == 0).all())
    assert float(sent.abs().max()) == pytest.approx(1e10)
    assert bool((sent[tiny != 0].sign() == tiny[tiny != 0].sign()).all())


def test_sign_random_keeps_magnitudes_and_turns_half_of_the_signs() -> None:
    values = rows(1, N)
    sent = forged(sign_random(), values, ONE)
    assert torch.equal(sent.abs(), values.abs())
    assert float((sent != values).double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(N))


def test_rescale_is_noise_of_up_to_ten_times_then_times_ten() -> None:
    values = rows(1, N)
    ratio = (forged(rescale(), values, ONE) / values)[0]
    assert -100 <= float(ratio.min()) < -99.9 and 99.9 < float(ratio.max()) <= 100
    assert float(ratio.std()) == pytest.approx(100 / math.sqrt(3), rel=0.01)  # uniform
    assert abs(float(ratio.mean())) < 4 * 100 / math.sqrt(3 * N)
    assert float((forged(rescale(3), values, ONE) / values).abs().max()) == pytest.approx(9, rel=1e-3)
