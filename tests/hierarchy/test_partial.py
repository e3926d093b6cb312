"""The partial form of a mean: any grouping gives the mean, the order of additions alone decides the bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.core.errors import ConfigError, HanseError
from hanse.hierarchy import partial
from hanse.hierarchy.partial import Partial, Vector


def rows(clients: int, size: int, seed: int = 0, dtype: str = "float32") -> list[Vector]:
    return list(np.random.default_rng(seed).standard_normal((clients, size)).astype(dtype))


def empty(size: int, dtype: str = "float32") -> Partial:
    return Partial(np.full(size, np.nan, dtype))  # what was there before must not matter


def flat(x: list[Vector], weights: list[float]) -> Vector:
    wide = np.longdouble(np.stack(x))
    return (wide * np.array(weights, np.longdouble)[:, None]).sum(0) / sum(weights)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), clients=st.integers(1, 12), seed=st.integers(0, 1000), dtype=st.sampled_from(["float32", "float64"]))
def test_any_tree_gives_the_flat_weighted_mean(data: st.DataObject, clients: int, seed: int, dtype: str) -> None:
    x = rows(clients, 37, seed)
    weights = data.draw(st.lists(st.floats(0.1, 1000), min_size=clients, max_size=clients))
    parts = []
    for row, weight in zip(x, weights, strict=True):
        parts.append(empty(37, dtype))
        parts[-1].add([row], [weight])
    while len(parts) > 1:
        a = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        b = parts[data.draw(st.integers(0, len(parts) - 1))]
        b.merge(a)
    mean, weight = parts[0].finish()
    assert weight == pytest.approx(sum(weights), rel=1e-12)
    scale = np.abs(np.stack(x)).max()
    assert np.abs(mean - flat(x, weights)).max() <= (1e-6 if dtype == "float32" else 1e-12) * scale


@pytest.mark.parametrize("weight", [1.0, 3.0, 601.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_equal_clients_give_exactly_the_mean(weight: float, dtype: str) -> None:
    x, y = rows(2, 1000, dtype=dtype)
    eager = empty(1000, dtype)
    eager.add([x], [weight])
    eager.add([y], [weight])
    mean, total = eager.finish()
    assert np.array_equal(mean, (x + y) / 2) and total == 2 * weight


def test_bits_depend_neither_on_blocks_nor_on_who_waited_with_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = rows(5, 1000), [1.0, 2.0, 0.3, 7.0, 1.0]
    found = []
    for block, cuts in ((1 << 16, [5]), (64, [1, 1, 1, 1, 1]), (333, [2, 3])):
        monkeypatch.setattr(partial, "BLOCK", block)
        one, at = empty(1000), 0
        for n in cuts[:-1]:
            one.add(x[at : at + n], weights[at : at + n])
            at += n
        found.append(one.finish(x[at:], weights[at:])[0])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_what_weighs_nothing_is_left_out_whatever_it_holds() -> None:
    x = rows(1, 10)[0]
    mean, weight = empty(10).finish([np.full(10, np.inf, np.float32), x], [0.0, 2.0])
    assert np.array_equal(mean, x) and weight == 2
    with pytest.raises(HanseError, match="all weights are 0"):
        empty(10).finish([x], [0.0])


def test_halves_are_added_in_the_type_of_the_sums() -> None:
    x = rows(3, 100, dtype="float16")
    mean, _ = empty(100, "float64").finish(x, [1.0, 2.0, 3.0])
    assert np.abs(mean - flat(x, [1, 2, 3])).max() < 1e-14


@pytest.mark.parametrize(
    ("update", "weight", "message"),
    [
        (np.zeros(10, np.int64), 1.0, "update: int64"),
        (np.zeros(9, np.float32), 1.0, r"allowed: floating numbers of shape \(10,\)"),
        (np.zeros(10, np.float32), -1.0, "weight: -1.0; allowed: 0 or more"),
        (np.zeros(10, np.float32), float("nan"), "weight: nan"),
    ],
)
def test_what_cannot_be_averaged_is_refused(update: Vector, weight: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        empty(10).add([update], [weight])
    with pytest.raises(ConfigError, match="sums: int32"):
        Partial(np.zeros(10, np.int32))
