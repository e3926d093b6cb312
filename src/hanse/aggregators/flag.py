"""Flag Aggregator: the mean of the rows' projections on a subspace that explains most of them well.

Almasi, Mishra, Vamanan, Ravi: "Flag Aggregator: Scalable Distributed Training under Failures and Augmented Losses using Convex
Optimization", ICLR 2024, arXiv 2302.05865.

    x_i = g_i / ||g_i||,  X = [x_1 ... x_p];   Y: n x m, orthonormal columns
    repeat  v_i = ||Y^T x_i||^2,                    a_i = (|1 - v_i| + eps)^(-1/4)
            v_ij = ||Y^T (x_i - x_j)||^2,           a_ij = lam / (p (p-1)) (|1 - v_ij| + eps)^(-1/4)   for all ordered pairs
            Y = first m left singular vectors of [a_i x_i ..., a_ij (x_i - x_j) ...]
    d = (1/p) Y Y^T (sum_i x_i) median_i ||g_i||

In inner products K = X^T X: the matrix times its transpose is X L X^T with L = diag(a_i^2) + the Laplacian of the weights a_ij^2,
so with L = F F^T and F^T K F = V S^2 V^T it is Y = X C, C = F V_m S_m^-1, and the pairs cost no more than the rows.

Deviations: the authors' code averages the normalised rows and divides by m; here they are made as long as the median row, and
divided by p. It takes one step from a random subspace; here a start on the leading directions of X and up to five steps are the
default. As in the code lam / (p (p-1)) multiplies a column, so what the steps lower is sum_i sqrt(|1 - v_i|) +
(lam / (p (p-1)))^2 sum_ij sqrt(|1 - v_ij|).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from hanse.aggregators.base import Combination

EPS = 1e-7


class flag(Combination):
    """The mean of the rows' projections on the subspace that explains most of them well; rows are normalised first.

    Ignores weights, and rows of zeros; of nothing but these it is zero. At most as long as the median row.
    """

    m: PositiveInt | None = None
    """Dimension of the subspace, at most p; None: ceil((p + 1) / 2)."""
    lam: NonNegativeFloat = 0.0
    """Weight of the differences between rows."""
    iterations: PositiveInt = 5
    """Reweighted decompositions, at most; they end when the objective falls by less than 1e-10."""
    start: Literal["leading", "random"] = "leading"
    """leading: the m leading directions of the rows; random: any m directions of a space of far more dimensions than rows, which
    explain nothing of any row, so that the first iteration gives the leading ones."""

    @property
    def centred(self) -> bool:
        return False

    def coefficients(self, gram: Tensor, weights: Tensor | None) -> Tensor:
        length = gram.diagonal().clamp_min(0).sqrt()
        seen = length > 0
        c = torch.zeros_like(length)
        if bool(seen.any()):
            n = length[seen]
            K = gram[seen][:, seen] / (n[:, None] * n)
            C = self.subspace(K)
            c[seen] = (C @ (C.T @ K.sum(1))) * n.quantile(0.5) / (len(n) * n)
        return c

    def subspace(self, K: Tensor) -> Tensor:
        """``C`` ``[p, m]`` of the subspace Y = X C, from the inner products ``[p, p]`` of normalised rows."""
        p = len(K)
        m, lam = min(self.m or p // 2 + 1, p), self.lam / max(1, p * (p - 1))
        C = _leading(K, torch.eye(p).to(K), m)
        before = self._objective(K, C, lam)
        for _ in range(self.iterations - (self.start == "random")):
            next_C = _leading(K, _factor(K, C, lam), m)
            after = self._objective(K, next_C, lam)
            if not after < before:
                break
            C, fell, before = next_C, before - after, after
            if fell < 1e-10:
                break
        return C

    def _objective(self, K: Tensor, C: Tensor, lam: float) -> float:
        v, pairs = _unexplained(K, C)
        return float(v.sqrt().sum() + lam**2 * pairs.sqrt().sum())


def _leading(K: Tensor, F: Tensor, m: int) -> Tensor:
    """The m leading left singular vectors of ``X F``, as combinations ``[p, m]`` of the columns of X; fewer if its rank is less."""
    squares, V = torch.linalg.eigh(F.T @ K @ F)
    squares, V = squares[-m:], V[:, -m:]
    there = squares > 1e-12 * squares[-1]
    return F @ V[:, there] / squares[there].sqrt()


def _unexplained(K: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """``|1 - v_i|`` ``[p]`` and ``|1 - v_ij|`` ``[p, p]``, the latter 0 where i = j."""
    inside = C.T @ K
    Q = inside.T @ inside
    v = Q.diagonal()
    return (1 - v).abs(), (1 - (v[:, None] + v - 2 * Q)).abs().fill_diagonal_(0)


def _factor(K: Tensor, C: Tensor, lam: float) -> Tensor:
    """``F`` with ``F F^T = diag(a_i^2) + the Laplacian of a_ij^2``, each pair counted in both orders."""
    v, pairs = _unexplained(K, C)
    a = (v + EPS) ** -0.25
    if not lam:
        return torch.diag(a)
    squares = (2 * lam**2 * (pairs + EPS) ** -0.5).fill_diagonal_(0)
    laplacian = squares.sum(1).diag() - squares
    factor: Tensor = torch.linalg.cholesky(torch.diag(a.square()) + laplacian)
    return factor
