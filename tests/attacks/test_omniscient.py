"""Liars that know what the honest send."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from byzfl_attacks import judge
from cohorts import cohorts, forged, rows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hanse.attacks import alie, free_rider, ipm, mimic
from hanse.attacks.omniscient import most_hidden

SOME = torch.tensor([False, True, False, False, True, False])


# ---- a little is enough


def test_the_paper_s_example() -> None:
    """p = 50, f = 24: two more supporters are needed, z = Phi^-1(24 / 26)."""
    assert most_hidden(50, 24) == NormalDist().inv_cdf(24 / 26)
    assert most_hidden(50, 24) == pytest.approx(1.4261, abs=5e-5)


@pytest.mark.parametrize(("p", "f", "z"), [(10, 2, 0.0), (15, 3, 0.2104), (10, 4, 0.4307), (11, 5, 0.9674), (10, 1, -0.1397)])
def test_few_liars_cannot_go_far(p: int, f: int, z: float) -> None:
    assert most_hidden(p, f) == pytest.approx(z, abs=5e-5)


@given(st.integers(1, 60), st.data())
def test_the_formula_for_a_minority_and_a_finite_number_for_all(p: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(1, p))
    z = most_hidden(p, f)
    s = math.floor(p / 2 + 1) - f
    if 2 * f < p and p - f > s:
        assert NormalDist().cdf(z) == pytest.approx((p - f - s) / (p - f), abs=1e-12)
    if p - f < 2:
        assert z == 0
    assert math.isfinite(z)


@given(cohorts(honest=2), st.floats(-3, 3))
def test_alie_is_mean_minus_z_sample_deviations(cohort: tuple[Tensor, Tensor], z: float) -> None:
    values, lies = cohort
    h = values[~lies].numpy()
    expected = h.mean(0) - z * h.std(0, ddof=1)
    np.testing.assert_allclose(forged(alie(z), values, lies)[lies], np.broadcast_to(expected, values[lies].shape), atol=1e-12)


def test_alie_by_default_takes_z_from_the_cohort() -> None:
    values, lies = rows(50, 7), torch.arange(50) < 24
    torch.testing.assert_close(forged("alie", values, lies), forged(alie(most_hidden(50, 24)), values, lies), rtol=0, atol=0)


def test_one_honest_client_has_no_deviation() -> None:
    values, lies = rows(3, 7), torch.tensor([True, False, True])
    assert torch.equal(forged(alie(1.5), values, lies), values[1].expand(3, 7))


# ---- inner product manipulation


@given(cohorts(honest=1), st.floats(0.01, 20))
def test_ipm_sends_minus_eps_times_the_honest_mean(cohort: tuple[Tensor, Tensor], eps: float) -> None:
    values, lies = cohort
    sent, mean = forged(ipm(eps), values, lies), values[~lies].mean(0)
    torch.testing.assert_close(sent[lies], (-eps * mean).expand_as(sent[lies]))


def test_ipm_reverses_the_mean_of_all_above_honest_by_liars() -> None:
    values = rows(6, 20)
    mean = values[~SOME].mean(0)
    for eps, sign in ((1.9, 1), (2.1, -1)):  # (p - f) / f = 2
        total = forged(ipm(eps), values, SOME).mean(0)
        torch.testing.assert_close(total, (4 - 2 * eps) / 6 * mean)
        assert float(total @ mean) * sign > 0


# ---- mimic


def test_mimic_copies_the_client_it_is_told_to() -> None:
    values, ids = rows(6, 8), torch.tensor([30, 11, 12, 19, 14, 15])
    sent = forged(mimic(19), values, SOME, ids)
    assert torch.equal(sent[SOME], values[3].expand(2, 8))


@pytest.mark.parametrize("victim", [None, 99, 4], ids=["nobody", "one who is not there", "a liar"])
def test_mimic_else_copies_the_update_farthest_from_the_honest_mean(victim: int | None) -> None:
    values = rows(6, 8) / 10
    values[3] += 1
    values[4] += 100  # a liar's own update counts for nothing
    assert torch.equal(forged(mimic(victim), values, SOME)[SOME], values[3].expand(2, 8))


# ---- free riders


def test_free_riders_send_noise_of_the_median_honest_norm() -> None:
    values, norms = rows(6, 400), torch.tensor([1.0, 50, 2, 4, 50, 8], dtype=torch.float64)
    values *= (norms / values.norm(dim=1))[:, None]
    sent = forged("free_rider", values, SOME)[SOME]
    torch.testing.assert_close(sent.norm(dim=1), torch.full((2,), 3.0, dtype=torch.float64))  # between 2 and 4
    assert abs(float(torch.cosine_similarity(sent[0], sent[1], 0))) < 4 / math.sqrt(400)
    # uniform: no entry is above sqrt(3) times the root mean square, and some come near
    assert 0.95 < float(sent[0].abs().max()) / (3 * math.sqrt(3 / 400)) < 1.1


def test_free_riders_clip_but_do_not_stretch() -> None:
    values = rows(6, 400)
    small, large = (forged(free_rider(norm), values, SOME)[SOME] for norm in (0.5, 1e6))
    torch.testing.assert_close(small.norm(dim=1), torch.full((2,), 0.5, dtype=torch.float64))
    assert float(large.abs().max()) <= 1 and float(large.std()) == pytest.approx(1 / math.sqrt(3), rel=0.1)
    torch.testing.assert_close(small / small.norm(dim=1, keepdim=True), large / large.norm(dim=1, keepdim=True))


# ---- with nobody honest, and against somebody else's code


@pytest.mark.parametrize("text", ["alie(1.5)", "ipm", "mimic", "free_rider"])
def test_with_nobody_honest_the_liars_own_updates_are_looked_at(text: str) -> None:
    values = rows(3, 9)
    both = torch.cat([values, values])  # three liars, and three honest clients with the same updates
    sent = forged(text, both, torch.tensor([True] * 3 + [False] * 3))[:3]
    torch.testing.assert_close(forged(text, values, torch.ones(3, dtype=torch.bool)), sent)


@given(cohorts(honest=2), st.floats(0.1, 3))
def test_as_byzfl_has_it(cohort: tuple[Tensor, Tensor], amount: float) -> None:
    """Its ALIE adds tau deviations where the paper takes z off; its sign flip is that of the honest mean, so an ipm of 1."""
    byzfl, (values, lies) = judge(), cohort
    honest = values[~lies].numpy()
    first = int((~lies).int().argmax())
    for attack, theirs in (
        (alie(amount), byzfl.ALittleIsEnough(-amount)),
        (ipm(amount), byzfl.InnerProductManipulation(amount)),
        (ipm(1.0), byzfl.SignFlipping()),
        (mimic(first), byzfl.Mimic(0)),
    ):
        expected = torch.from_numpy(np.asarray(theirs(honest)))
        sent = forged(attack, values, lies)[lies]
        torch.testing.assert_close(sent, expected.expand_as(sent), rtol=1e-12, atol=1e-12)
