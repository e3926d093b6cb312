"""Rules by coordinate and Bulyan, by brute force and beside byzfl."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from judge import byzfl
from made_rows import made, some_rows
from torch import Tensor

from hanse.aggregators import bulyan, meamed, median, phocas, trimmed_mean
from hanse.core.errors import ConfigError


def closest(values: list[float], centre: float, k: int) -> float:
    return sum(sorted(values, key=lambda v: (abs(v - centre), v))[:k]) / k


def middle(values: list[float]) -> float:
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def trimmed(values: list[float], f: int) -> float:
    return sum(sorted(values)[f : len(values) - f]) / (len(values) - 2 * f)


@given(rows=some_rows, f=st.integers(0, 3))
def test_every_coordinate_by_brute_force(rows: Tensor, f: int) -> None:
    p, columns = len(rows), rows.T.tolist()
    want = {
        median(): [middle(c) for c in columns],
        trimmed_mean(f): [trimmed(c, f) for c in columns],
        meamed(f): [closest(c, middle(c), p - f) for c in columns],
        phocas(f): [closest(c, trimmed(c, f), p - f) for c in columns],
    }
    for rule, result in want.items():
        torch.testing.assert_close(rule(rows), torch.tensor(result, dtype=torch.float64), rtol=0, atol=1e-12)


@given(rows=some_rows)
def test_nothing_dropped_is_the_mean(rows: Tensor) -> None:
    for rule in (trimmed_mean(0), meamed(0), phocas(0)):
        torch.testing.assert_close(rule(rows), rows.mean(0), rtol=0, atol=1e-12)


def test_the_median_of_an_even_number_and_of_one() -> None:
    assert median()(torch.tensor([[1.0], [2.0], [4.0], [9.0]])).item() == 3
    assert median()(torch.tensor([[7.0, 8.0]])).tolist() == [7, 8]


@given(rows=some_rows)
def test_beside_byzfl(rows: Tensor) -> None:
    judge, given = byzfl(), rows.numpy()
    for ours, theirs in ((median(), judge.Median()), (trimmed_mean(2), judge.TrMean(2)), (meamed(2), judge.Meamed(2))):
        torch.testing.assert_close(ours(rows), torch.as_tensor(theirs(given)), rtol=0, atol=1e-6)


def brute_bulyan(rows: Tensor, f: int) -> Tensor:
    left, selected = list(range(len(rows))), []
    while len(selected) < len(rows) - 2 * f:
        p = len(left)
        between = [[float((rows[i] - rows[j]).square().sum()) for j in left if j != i] for i in left]
        scores = [sum(sorted(row)[: max(1, p - f - 2)]) for row in between]
        selected.append(left.pop(scores.index(min(scores))))
    k = len(selected) - 2 * f
    return torch.tensor([closest(c, middle(c), k) for c in rows[selected].T.tolist()], dtype=torch.float64)


@pytest.mark.parametrize(("p", "f"), [(1, 0), (3, 0), (7, 1), (8, 1), (11, 2), (14, 2), (17, 3)])
def test_bulyan_by_brute_force(p: int, f: int) -> None:
    if p < 4 * f + 3:
        with pytest.raises(ConfigError, match="needs p >= 4f"):
            bulyan(f)(made(p))
        return
    for seed in range(5):
        rows = made(p, 6, seed)
        torch.testing.assert_close(bulyan(f)(rows), brute_bulyan(rows, f), rtol=0, atol=1e-12)


@given(seed=st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter_to_bulyan_from_three_faults_on(seed: int) -> None:
    """With fewer it comes down to one neighbour, and of two rows nearest to each other the first wins."""
    rows, order = made(15, 6, seed), torch.randperm(15, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(bulyan(3)(rows[order]), bulyan(3)(rows), rtol=0, atol=1e-12)


def test_bulyan_refuses_too_few() -> None:
    with pytest.raises(ConfigError, match=r"f=3 and p=14 rows are not allowed: it needs p >= 4f\+3 = 15"):
        bulyan(3)(made(14))


def test_a_value_far_off_leaves_no_trace() -> None:
    """What is outside the window is never added to anything, so it cannot wipe out digits either."""
    rows = made(11, 50, dtype=torch.float32)
    honest = rows[2:].clone()
    rows[0], rows[1] = 3e38, -3e38
    for rule in (median(), trimmed_mean(2), meamed(2), phocas(2), bulyan(2)):
        found = rule(rows)
        assert bool(((found >= honest.min(0).values) & (found <= honest.max(0).values)).all())
