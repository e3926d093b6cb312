"""Pre-aggregations: their matrices by brute force and beside byzfl, and the same results in inner products as on new rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from judge import byzfl
from made_rows import made, some_rows
from torch import Tensor

from hanse.aggregators import Aggregator, PreAggregation, bucketing, clipping, mean, nnm, series

RULES = (
    "mean",
    "krum(1)",
    "multi_krum(1)",
    "geometric_median",
    "centred_clipping(1)",
    "flag",
    "median",
    "trimmed_mean(1)",
    "bulyan(1)",
)


def new_rows(mixing: PreAggregation, rows: Tensor) -> Tensor:
    return mixing.matrix(rows @ rows.T) @ rows


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("before", ["nnm(2)", "bucketing(2)", "clipping", "clipping(2) | nnm(2)"])
def test_a_rule_after_it_is_the_rule_on_the_new_rows(before: str, rule: str) -> None:
    rows, mixing = made(15, 30), PreAggregation.parse(before)
    found = Aggregator.parse(f"{before} | {rule}")(rows)
    # Inner products of the differences seed other buckets than plain ones; rows that differ much are never centred.
    torch.testing.assert_close(found, Aggregator.parse(rule)(new_rows(mixing, rows)), rtol=0, atol=1e-9)


@given(rows=some_rows)
def test_beside_byzfl(rows: Tensor) -> None:
    judge = byzfl()
    for f in (0, 1, 3):
        torch.testing.assert_close(new_rows(nnm(f), rows), torch.as_tensor(judge.NNM(f)(rows.numpy())), rtol=0, atol=1e-6)
    for bound in (0.5, 2.0, 50.0):
        theirs = judge.Clipping(bound)(rows.numpy().copy())
        torch.testing.assert_close(new_rows(clipping(bound), rows), torch.as_tensor(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 11, 20])
def test_buckets_beside_byzfl(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """byzfl shuffles by NumPy's global generator; with our order in its place the buckets are the same."""
    judge, rows = byzfl(), made(11)
    order = bucketing(1).matrix(rows @ rows.T).argmax(1).numpy()

    def same_order(x: Any) -> Any:
        return x[order]

    monkeypatch.setattr(np.random, "permutation", same_order)
    if size > len(rows):  # there byzfl averages an empty bucket with the others
        assert torch.allclose(new_rows(bucketing(size), rows), rows.mean(0, keepdim=True))
    else:
        torch.testing.assert_close(new_rows(bucketing(size), rows), torch.as_tensor(judge.Bucketing(size)(rows.numpy())))


def test_buckets_repeat_and_depend_on_the_rows() -> None:
    rule = Aggregator.parse("bucketing(2) | krum(1)")
    first = [rule(made(15, 30, seed)) for seed in range(6)]
    again = [rule(made(15, 30, seed)) for seed in range(6)]
    assert all(map(torch.equal, first, again))
    matrices = [bucketing(2).matrix(made(15, 30, s) @ made(15, 30, s).T) for s in range(6)]
    assert not all(torch.equal(matrices[0], m) for m in matrices[1:])
    assert all(m.shape == (8, 15) and torch.allclose(m.sum(1), torch.ones(8).double()) for m in matrices)


def test_clipping_to_the_median_length() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0], [0.0, 1.0], [6.0, 8.0]]).double()
    clipped = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [3.0, 4.0]]).double()
    torch.testing.assert_close(new_rows(clipping(), rows), clipped)


def test_weights_go_with_the_rows() -> None:
    rows, w = made(6), torch.arange(1.0, 7).double()
    clipped = new_rows(clipping(1), rows)
    torch.testing.assert_close(Aggregator.parse("clipping(1) | mean")(rows, w), mean()(clipped, w))
    m = bucketing(2).matrix(rows @ rows.T)
    torch.testing.assert_close(Aggregator.parse("bucketing(2) | mean")(rows, w), mean()(m @ rows, 2 * m @ w))


def test_nnm_keeps_the_honest_together() -> None:
    rows = made(9, 20)
    rows[:2] += 1000
    mixed = new_rows(nnm(2), rows)
    torch.testing.assert_close(mixed[2:], rows[2:].mean(0).expand(7, -1))


@pytest.mark.parametrize(
    "rule", ["krum(2)", "multi_krum(2)", "geometric_median", "bulyan(1)", "nnm(2) | krum(2)", "trimmed_mean(2)"]
)
@pytest.mark.parametrize("before", ["clipping", "clipping(5)", "nnm(1) | clipping", "clipping | nnm(2)"])
def test_rows_near_each_other_are_told_apart_after_clipping(before: str, rule: str) -> None:
    """Clipped rows do not move with the origin, so their inner products may not be taken from another one."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(500, generator=generator, dtype=torch.float64)
    rows = base + 0.05 * torch.randn(9, 500, generator=generator, dtype=torch.float64)
    rows[8] = 3 * base
    stages, x = PreAggregation.parse(before), rows
    for stage in stages.mixings if isinstance(stages, series) else (stages,):
        x = stage.matrix(x @ x.T) @ x
    torch.testing.assert_close(Aggregator.parse(f"{before} | {rule}")(rows), Aggregator.parse(rule)(x), rtol=1e-6, atol=1e-9)
