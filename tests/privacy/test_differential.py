"""Clipping bounds what a client can do, the noise is what was asked for, and the accountant's figures are the library's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.rdp import RdpAccountant
from hypothesis import given
from hypothesis import strategies as st

from hanse.core.errors import ConfigError, MissingExtraError, PrivacyError
from hanse.core.streams import Streams
from hanse.privacy import differential
from hanse.privacy.differential import WITHIN, clipped


@given(
    rows=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
    bound=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_no_row_exceeds_the_bound(rows: list[list[float]], bound: float, dtype: torch.dtype) -> None:
    """Not by rounding either; short rows keep every bit, long ones their direction."""
    x = torch.tensor(rows, dtype=dtype)
    shrunk, within = clipped(x, bound)
    norms = shrunk.double().norm(dim=1)
    assert bool((norms <= bound).all())
    assert torch.equal(within, x.double().norm(dim=1) <= bound)
    assert torch.equal(shrunk[within], x[within])
    torch.testing.assert_close(norms[~within], torch.full_like(norms[~within], bound), rtol=1e-6, atol=0)
    torch.testing.assert_close(shrunk[~within] * (x[~within].norm(dim=1, keepdim=True) / bound), x[~within], rtol=1e-5, atol=1e-2)


def test_all_that_a_client_sends_is_clipped_together() -> None:
    sums = {"delta": torch.tensor([[3.0, 0.0], [0.3, 0.0]]), "c": torch.tensor([[4.0], [0.4]])}
    protected = differential().protect(sums, torch.ones(2), bound=1.0)
    torch.testing.assert_close(protected["delta"], torch.tensor([[0.6, 0.0], [0.3, 0.0]]))
    torch.testing.assert_close(protected["c"], torch.tensor([[0.8], [0.4]]))
    assert sums["c"][0] == 4  # as it was


def test_what_has_no_bound_is_refused() -> None:
    part, ones = differential(), torch.ones(2)
    for weight in (torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])):
        with pytest.raises(PrivacyError, match="weights='uniform'"):
            part.protect({"delta": torch.ones(2, 3)}, weight, 1.0)
    with pytest.raises(PrivacyError, match="'delta' has been added up"):
        part.protect({"delta": torch.ones(3)}, ones, 1.0)
    with pytest.raises(PrivacyError, match="batch-norm"):
        part.protect({"delta": torch.ones(2, 3), "buffers": torch.ones(2, 2)}, ones, 1.0)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(PrivacyError, match="not finite"):
            part.protect({"delta": torch.tensor([[1.0], [bad]])}, ones, 1.0)
    assert part.protect({"delta": torch.ones(2, 3), "buffers": torch.ones(2, 0)}, ones, 9.0)["buffers"].shape == (2, 0)


def test_noise_has_the_deviation_asked_for_and_is_new_each_round() -> None:
    part, streams, size = differential(noise=0.7), Streams(3), 200_000
    total = {"delta": torch.full((size,), 5.0), "c": torch.zeros(size)}
    noised, bound = part.release(total, bound=2.0, cohort=10, streams=streams, round=4)
    again, _ = part.release(total, bound=2.0, cohort=10, streams=streams, round=4)
    later, _ = part.release(total, bound=2.0, cohort=10, streams=streams, round=5)
    assert bound == 2.0 and torch.equal(noised["delta"], again["delta"])
    found = torch.stack([noised["delta"] - 5, noised["c"], later["c"]])
    assert bool((found.mean(1).abs() < 4 * 1.4 / math.sqrt(size)).all())
    assert bool(((found.std(1) / 1.4 - 1).abs() < 4 / math.sqrt(2 * size)).all())
    assert float((torch.corrcoef(found) - torch.eye(3)).abs().max()) < 4 / math.sqrt(size)
    assert bool((total["delta"] == 5).all())


def test_no_noise_changes_nothing() -> None:
    total = {"delta": torch.randn(9, generator=torch.Generator().manual_seed(0))}
    noised, _ = differential(noise=0).release(total, 1.0, 5, Streams(0), 0)
    assert torch.equal(noised["delta"], total["delta"])


def rounds_of(part: differential, norms: torch.Tensor, rounds: int) -> list[float]:
    """The bounds of a run whose clients always have contributions of these norms."""
    bounds, streams, sums = [part.clip], Streams(1), {"delta": norms[:, None]}
    for round in range(rounds):
        protected = part.protect(sums, torch.ones(len(norms)), bounds[-1])
        total = {name: rows.sum(0) for name, rows in protected.items()}
        assert set(total) == {"delta", WITHIN}
        noised, bound = part.release(total, bounds[-1], len(norms), streams, round)
        assert set(noised) == {"delta"}
        bounds.append(bound)
    return bounds


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("clip", [0.01, 50.0])
def test_the_bound_finds_the_quantile_of_the_norms(quantile: float, clip: float) -> None:
    """From below it grows by at most exp(eta gamma) a round: from 0.01 to 1 in 230 rounds where gamma is 0.1."""
    norms = torch.linspace(1, 3, 201)
    target = float(norms.quantile(quantile))
    exact = rounds_of(differential(clip=clip, noise=0, adaptive=True, quantile=quantile), norms, 500)
    assert exact[-1] == pytest.approx(target, rel=0.02)
    noised = rounds_of(differential(clip=clip, noise=1, adaptive=True, quantile=quantile), norms, 500)
    assert np.mean(noised[-100:]) == pytest.approx(target, rel=0.05) and noised[-1] != exact[-1]


def test_one_step_of_the_bound_by_hand() -> None:
    """Two of four within: b = 1/2, so S moves by exp(-eta (1/2 - gamma))."""
    part = differential(clip=2.0, noise=0, adaptive=True, quantile=0.9, rate=0.3)
    assert rounds_of(part, torch.tensor([1.0, 2.0, 3.0, 4.0]), 1)[1] == pytest.approx(2 * math.exp(-0.3 * (0.5 - 0.9)))


def test_the_two_noises_cost_together_what_z_costs() -> None:
    """The paper's split, and its consequence: the two Gaussian mechanisms composed have the divergence of one with z."""
    z, bits = differential(noise=1.2, adaptive=True).scales(cohort=100)
    assert bits == 5 and z == pytest.approx((1.2**-2 - (2 * bits) ** -2) ** -0.5)
    both = RdpAccountant().compose(dp_event.GaussianDpEvent(z)).compose(dp_event.GaussianDpEvent(2 * bits))
    np.testing.assert_allclose(both.rdp, RdpAccountant().compose(dp_event.GaussianDpEvent(1.2)).rdp, rtol=1e-12)
    assert differential(noise=1.2).scales(cohort=100) == (1.2, 0)


@pytest.mark.parametrize(("noise", "cohort", "rounds"), [(1.0, 20, 1), (1.0, 20, 500), (0.6, 1000, 3), (4.0, 5, 10_000)])
def test_epsilon_is_what_the_library_says(noise: float, cohort: int, rounds: int) -> None:
    part = differential(noise=noise, delta=1e-6)
    poisson = dp_event.PoissonSampledDpEvent(cohort / 1000, dp_event.GaussianDpEvent(noise))
    direct = RdpAccountant().compose(dp_event.SelfComposedDpEvent(poisson, rounds)).get_epsilon(1e-6)
    assert part.epsilon(rounds, cohort, 1000) == pytest.approx(direct, rel=1e-9)
    # Replacing a client moves a sum of clipped vectors by up to twice the bound.
    fixed = dp_event.SampledWithoutReplacementDpEvent(1000, cohort, dp_event.GaussianDpEvent(noise / 2))
    direct = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE).compose(fixed, rounds).get_epsilon(1e-6)
    assert part.epsilon(rounds, cohort, 1000, "fixed") == pytest.approx(direct, rel=1e-9)


def test_the_moments_accountant_s_published_figure() -> None:
    """Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, sec. 3.2: q = 0.01, sigma = 4, 10,000 steps: (1.26, 1e-5).

    Their bound, log(1/delta) / (alpha - 1) over whole orders up to 33, from our divergences; the library's conversion is tighter.
    """
    from hanse.privacy.differential import _one_round

    orders, rdp = _one_round(4.0, 100, 10_000, "bernoulli")
    whole = (orders == orders.round()) & (orders <= 33)
    published = (10_000 * rdp + math.log(1e5) / (orders - 1))[whole].min()
    assert published == pytest.approx(1.26, abs=0.005)
    assert 0.9 < differential(noise=4.0).epsilon(10_000, 100, 10_000) < published


def test_more_rounds_cost_more_and_more_noise_costs_less() -> None:
    for draw in ("bernoulli", "fixed"):
        spent = [differential().epsilon(rounds, 10, 1000, draw) for rounds in (0, 1, 10, 100, 1000)]
        assert spent[0] == 0 and spent == sorted(spent) and len(set(spent)) == 5
        spent = [differential(noise=z).epsilon(100, 10, 1000, draw) for z in (0, 0.5, 1.0, 2.0, 4.0)]
        assert spent[0] == math.inf and spent == sorted(spent, reverse=True) and len(set(spent)) == 5
        assert differential().epsilon(100, 10, 1000, draw) < differential().epsilon(100, 1000, 1000, draw)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"differential.bit_noise: 2.0 is not allowed without adaptive"):
        differential(bit_noise=2.0)
    with pytest.raises(ConfigError, match=r"differential.noise: 1.0 is not allowed: less than 2 bit_noise, 0.8"):
        differential(adaptive=True, bit_noise=0.4)
    with pytest.raises(
        ConfigError, match=r"noise: 1.0 is not allowed: with a cohort of 10 less than 2 bit_noise, 1; take a larger"
    ):
        differential(adaptive=True).scales(10)
    with pytest.raises(ConfigError, match=r"cohort: 11 is not allowed: from 1 to the number of clients, 10"):
        differential().epsilon(1, 11, 10)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="privacy = differential needs the extra 'privacy'"):
        differential().epsilon(1, 1, 10)
