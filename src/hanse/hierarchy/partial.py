"""The associative form of a weighted mean: init, add, merge, finish.

    sums = sum_i (w_i / u) x_i        W = sum_i w_i        u = the first weight        mean = sums / (W / u)

Weights are relative to the first, so that equal ones multiply nothing: two equal clients give exactly ``(x + y) / 2``. Memory is
passed once for all updates that wait, block by block: the sums of a block stay in the cache. Every product, sum and quotient is
rounded for itself, so bits depend on the order of additions alone, neither on the blocks nor on who waited with whom.

In NumPy, because processes that do nothing else then need a tenth of the memory and start-up time that torch takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanse.core.errors import ConfigError, HanseError

Vector = NDArray[np.floating[Any]]

BLOCK = 1 << 16
"""Numbers added at a time: a block of sums and one of products fit a core's second cache."""


class Partial:
    """A weighted mean under way, in ``sums`` ``[P]``, float32 or float64, whose contents do not matter at first."""

    def __init__(self, sums: Vector) -> None:
        if sums.dtype not in (np.float32, np.float64):
            raise ConfigError(f"sums: {sums.dtype}; allowed: float32, float64")
        self.sums, self.unit, self.weight = sums, 0.0, 0.0

    def add(self, updates: Sequence[Vector], weights: Sequence[float]) -> None:
        """Add ``updates`` ``[P]``, in this order and in one pass; those of weight 0 are left out, whatever they hold."""
        self._pass(updates, weights, weights, finish=False)

    def merge(self, other: Partial) -> None:
        """Add what another one has added."""
        self._pass([other.sums], [other.unit], [other.weight], finish=False)

    def finish(self, updates: Sequence[Vector] = (), weights: Sequence[float] = ()) -> tuple[Vector, float]:
        """The mean, in place of the sums, and the sum of all weights, after the last ``updates``, which are added in the same pass.

        Raises ``HanseError`` if nothing has a weight.
        """
        self._pass(updates, weights, weights, finish=True)
        return self.sums, self.weight

    def _pass(self, updates: Sequence[Vector], units: Sequence[float], weights: Sequence[float], finish: bool) -> None:
        for x, weight in zip(updates, weights, strict=True):
            if x.shape != self.sums.shape or x.dtype.kind != "f":
                raise ConfigError(f"update: {x.dtype} of shape {x.shape}; allowed: floating numbers of shape {self.sums.shape}")
            if not 0 <= weight < np.inf:
                raise ConfigError(f"weight: {weight}; allowed: 0 or more, finite")
        counted = [(x, unit) for x, unit, weight in zip(updates, units, weights, strict=True) if weight > 0]
        fresh = self.weight == 0
        if fresh and counted:
            self.unit = counted[0][1]
        self.weight += sum(weights)
        if finish and not self.weight:
            raise HanseError("a mean of nothing: all weights are 0")
        terms = [(x, unit / self.unit) for x, unit in counted]
        divisor = self.weight / self.unit if finish else 1.0
        if terms or divisor != 1:
            scratch = np.empty(min(BLOCK, len(self.sums)), self.sums.dtype)
            for start in range(0, len(self.sums), BLOCK):
                _add(self.sums[start : start + BLOCK], [(x[start : start + BLOCK], f) for x, f in terms], fresh, divisor, scratch)


def _add(sums: Vector, terms: Sequence[tuple[Vector, float]], fresh: bool, divisor: float, scratch: Vector) -> None:
    """``sums <- (sums + sum_i f_i x_i) / divisor`` for one block; ``fresh`` sums count as 0."""
    dtype, product = sums.dtype, scratch[: len(sums)]
    for x, factor in terms:
        if fresh:
            np.multiply(x, factor, out=sums, dtype=dtype)
            fresh = False
        elif factor == 1:
            np.add(sums, x, out=sums)
        else:
            np.multiply(x, factor, out=product, dtype=dtype)
            np.add(sums, product, out=sums)
    if divisor != 1:
        np.divide(sums, divisor, out=sums)
