"""Robust rules that combine whole rows, by coefficients that follow from inner products."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from hanse.aggregators.base import Combination, Faulty, need, shares
from hanse.aggregators.gram import away, distances
from hanse.core.errors import ConfigError


def krum_scores(between: Tensor, neighbours: int) -> Tensor:
    """Sums ``[p]`` of the squared distances ``[p, p]`` to the nearest others."""
    others = between.clone().fill_diagonal_(torch.inf)
    return others.sort(1).values[:, :neighbours].sum(1)


class multi_krum(Combination):
    """The mean of the rows that are nearest to their nearest others.

    Blanchard, El Mhamdi, Guerraoui, Stainer: "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NIPS 2017.

        score_i = sum of ||x_i - x_j||^2 over the p - f - 2 nearest others j;  the mean of the q lowest scores

    Needs p >= 2 f + 3 and q <= p. Of equal scores the first counts. Ignores weights.
    """

    f: Faulty
    """Rows that may be anything."""
    q: PositiveInt | None = None
    """Rows averaged; None: p - f - 2."""

    def coefficients(self, gram: Tensor, weights: Tensor | None) -> Tensor:
        p = len(gram)
        need(self, self.f, p, 2 * self.f + 3, "2f+3")
        q = self.q or p - self.f - 2
        if q > p:
            raise ConfigError(f"{self}: q={q} is not allowed: there are p={p} rows")
        best = krum_scores(distances(gram), p - self.f - 2).argsort(stable=True)[:q]
        return torch.zeros_like(gram[0]).index_fill_(0, best, 1 / q)


class krum(Combination):
    """The row that is nearest to its nearest others: ``multi_krum`` with q = 1."""

    f: Faulty
    """Rows that may be anything."""

    def coefficients(self, gram: Tensor, weights: Tensor | None) -> Tensor:
        need(self, self.f, len(gram), 2 * self.f + 3, "2f+3")
        return multi_krum(self.f, q=1).coefficients(gram, weights)


class geometric_median(Combination):
    """The vector with the least sum of distances to the rows, by smoothed Weiszfeld steps from their mean.

    Pillutla, Kakade, Harchaoui: "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing 2022, arXiv
    1912.13445, Algorithm 2.

        z <- sum_i b_i x_i / sum_i b_i,   b_i = w_i / max(nu, ||x_i - z||)

    Uses weights. Distances that are below about 1e-4 of the spread of float32 rows are not told apart.
    """

    iterations: PositiveInt = 8
    """Weiszfeld steps."""
    nu: PositiveFloat = 1e-6
    """Distance below which a row gains no more weight."""

    def coefficients(self, gram: Tensor, weights: Tensor | None) -> Tensor:
        w = shares(weights, len(gram)).to(gram.device)
        c = w
        for _ in range(self.iterations):
            b = w / away(gram, c).clamp_min(self.nu)
            c = b / b.sum()
        return c


class centred_clipping(Combination):
    """The mean of the rows' differences from a centre, each clipped to a length, added to the centre; which starts at zero.

    Karimireddy, He, Jaggi: "Learning from History for Byzantine Robust Optimization", ICML 2021, arXiv 2012.10333, Algorithm 2
    without the memory between rounds.

        v <- v + (1/p) sum_i (x_i - v) min(1, tau / ||x_i - v||)

    Ignores weights.
    """

    tau: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    """Length to which differences are clipped."""
    iterations: PositiveInt = 1
    """Steps of the centre."""

    @property
    def centred(self) -> bool:
        return False

    def coefficients(self, gram: Tensor, weights: Tensor | None) -> Tensor:
        c = torch.zeros_like(gram[0])
        for _ in range(self.iterations):
            kept = (self.tau / away(gram, c)).clamp_max(1)
            c = (1 - kept.mean()) * c + kept / len(gram)
        return c
