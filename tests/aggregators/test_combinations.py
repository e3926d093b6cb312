"""Krum, the geometric median and centred clipping, by brute force and beside byzfl."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from judge import byzfl
from made_rows import made, some_rows
from torch import Tensor

from hanse.aggregators import Aggregator, centred_clipping, geometric_median, krum, mean, multi_krum


def brute_scores(rows: Tensor, f: int) -> list[float]:
    p = len(rows)
    return [
        sum(sorted(float((x - y).square().sum()) for j, y in enumerate(rows) if j != i)[: p - f - 2]) for i, x in enumerate(rows)
    ]


@given(rows=some_rows)
def test_krum_is_the_row_of_the_lowest_score(rows: Tensor) -> None:
    scores = brute_scores(rows, 2)
    assert torch.equal(krum(2)(rows), rows[scores.index(min(scores))])
    best = sorted(range(len(rows)), key=scores.__getitem__)
    torch.testing.assert_close(multi_krum(2)(rows), rows[best[: len(rows) - 4]].mean(0))
    torch.testing.assert_close(multi_krum(2, q=3)(rows), rows[best[:3]].mean(0))
    assert torch.equal(multi_krum(2, q=1)(rows), krum(2)(rows))


def test_of_equal_scores_the_first_counts() -> None:
    """Two rows whose nearest other is each other: one neighbour, one distance."""
    rows = torch.tensor([[9.0], [1.0], [0.0]]).double()
    assert krum(0)(rows).item() == 1 and krum(0)(rows.flip(0)).item() == 0


def test_a_row_far_off_in_the_first_place_hides_no_difference_between_the_rest() -> None:
    rows = made(11, 4000, dtype=torch.float32) * 1e-3 + 5
    rows[0] *= 1e4
    want = brute_scores(rows.double(), 3)
    assert torch.equal(krum(3)(rows), rows[want.index(min(want))])


def test_rows_whose_squares_overflow_are_rows() -> None:
    rows = made(9, 6, dtype=torch.float32)
    rows[4] = 1e30
    for text in ("krum(3)", "multi_krum(3)", "bulyan(1)", "nnm(3) | krum(1)", "flag"):
        assert bool(Aggregator.parse(text)(rows).isfinite().all()), text
    assert krum(3)(rows).tolist() == krum(3)(rows.double()).float().tolist()


@given(rows=some_rows)
def test_krum_beside_byzfl(rows: Tensor) -> None:
    """byzfl sums p - f - 1 neighbours and averages p - f rows; ours p - f - 2: the same with its f one higher."""
    judge = byzfl()
    theirs = judge.Krum(3)(rows.numpy())
    torch.testing.assert_close(krum(2)(rows), torch.as_tensor(theirs), rtol=0, atol=1e-6)
    several = judge.MultiKrum(3)(rows.numpy())
    torch.testing.assert_close(multi_krum(2, q=len(rows) - 3)(rows), torch.as_tensor(several), rtol=0, atol=1e-6)


def test_the_geometric_median_of_points_on_a_line_is_the_one_in_the_middle() -> None:
    rows = torch.tensor([-3.0, -1.0, 0.5, 4.0, 90.0]).double()[:, None] * torch.tensor([3.0, 4.0]).double() / 5
    torch.testing.assert_close(geometric_median(200)(rows), rows[2], rtol=0, atol=1e-5)


def test_the_geometric_median_is_least_far_from_the_rows() -> None:
    rows, w = made(11, 5), torch.arange(1.0, 12).double()
    z = geometric_median(500)(rows, w)

    def cost(v: Tensor) -> float:
        return float((w * (rows - v).norm(dim=1)).sum())

    assert all(cost(z) <= cost(z + 1e-3 * step) for step in [*torch.eye(5).double(), *-torch.eye(5).double()])
    torch.testing.assert_close(geometric_median()(rows, 7 * w), geometric_median()(rows, w))
    whole = rows.repeat_interleave(torch.arange(1, 12), 0)
    torch.testing.assert_close(geometric_median()(rows, w), geometric_median()(whole))


@given(rows=some_rows)
def test_the_geometric_median_beside_byzfl(rows: Tensor) -> None:
    """byzfl starts from zero, ours from the mean: the same for rows whose mean is zero."""
    rows = rows - rows.mean(0)
    for steps, nu in ((1, 0.1), (8, 1e-6), (8, 1.0)):
        theirs = byzfl().GeometricMedian(nu=nu, T=steps)(rows.numpy())
        torch.testing.assert_close(geometric_median(steps, nu)(rows), torch.as_tensor(theirs), rtol=0, atol=1e-6)


@given(rows=some_rows)
def test_centred_clipping_beside_byzfl(rows: Tensor) -> None:
    for tau, steps in ((0.5, 1), (1.5, 4), (100.0, 2)):
        theirs = byzfl().CenteredClipping(L=steps, tau=tau)(rows.numpy())
        torch.testing.assert_close(centred_clipping(tau, steps)(rows), torch.as_tensor(theirs), rtol=0, atol=1e-6)


def test_centred_clipping_is_bounded_and_the_mean_where_nothing_is_long() -> None:
    rows = made()
    torch.testing.assert_close(centred_clipping(1e6)(rows), rows.mean(0))
    rows[3] *= 1e8
    assert float(centred_clipping(0.1, iterations=3)(rows).norm()) <= 0.3


def test_the_mean_uses_weights_and_robust_rules_do_not() -> None:
    rows, w = made(), torch.arange(1.0, 12).double()
    torch.testing.assert_close(mean()(rows, w), (w[:, None] * rows).sum(0) / w.sum())
    torch.testing.assert_close(mean()(rows), rows.mean(0))
    for text in ("krum(2)", "multi_krum(2)", "centred_clipping(1)", "flag", "median", "trimmed_mean(2)", "meamed(2)", "bulyan(1)"):
        assert torch.equal(Aggregator.parse(text)(rows, w), Aggregator.parse(text)(rows))
    with pytest.raises(ValueError, match="weights sum to 0"):
        mean()(rows, torch.zeros(11))
    rows[2, 0], w[2] = math.nan, 0
    assert bool(mean()(rows, w).isfinite().all())
