"""Low rank: a matrix as two thin ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from hanse.codecs.base import Sending
from hanse.codecs.chain import Load, Select
from hanse.codecs.sparse import words

ITERATIONS = 2
"""Steps from the start, of which PowerSGD takes one and begins where it was the round before."""
TOGETHER = 1 << 22
"""Entries that are worked on together."""


class lowrank(Select):
    """A layer's matrix M ``[a, b]``, b all axes but the first, as P ``[a, rank]`` with orthonormal columns and Q ``[b, rank]``.

        twice:  P <- orthonormal(M Q);  Q <- M^T P              arrives: P Q^T

    PowerSGD (Vogels, Karimireddy, Jaggi, NeurIPS 2019, arXiv 1905.13727, Algorithm 1) without its warm start: Q is drawn from the
    message's seed, and two steps make up for that (our choice). It goes with error feedback. Layers that two thin matrices would
    not make shorter, and those of one axis, are sent as they are.
    """

    rank: PositiveInt = 2
    """Columns of either matrix."""
    layered: ClassVar[bool] = True

    def most(self, shape: tuple[int, ...]) -> int:
        a, b = _matrix(shape)
        return min(self.rank * (a + b), a * b)

    def _shortens(self, shape: tuple[int, ...]) -> bool:
        return self.most(shape) < math.prod(shape)

    def forward(self, load: Load, sending: Sending) -> Load:
        if not self._shortens(load.shape):
            return load
        a, b = _matrix(load.shape)
        drawn = words(sending.seeds.to(load.values.device), load.name, b * self.rank)
        q = drawn.double().view(len(drawn), b, self.rank) / 2**32 - 0.5
        values = load.values.new_empty(len(q), self.most(load.shape))
        rows = max(1, TOGETHER // (a * b))
        for i in (slice(at, at + rows) for at in range(0, len(q), rows)):
            values[i] = _factors(load.values[i].double().view(-1, a, b), q[i])
        return replace(load, values=values)

    def backward(self, load: Load) -> Load:
        if not self._shortens(load.shape):
            return load
        a, b = _matrix(load.shape)
        p = load.values[:, : a * self.rank].reshape(-1, a, self.rank)
        q = load.values[:, a * self.rank :].reshape(-1, b, self.rank)
        found = p[:, :, None, 0] * q[:, None, :, 0]
        for j in range(1, self.rank):
            found += p[:, :, None, j] * q[:, None, :, j]
        return replace(load, values=found.flatten(1))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _factors(m: Tensor, q: Tensor) -> Tensor:
    """P and Q of matrices ``[C, a, b]``, one after the other, ``[C, rank * (a + b)]``."""
    for _ in range(ITERATIONS):
        p = _orthonormal(torch.stack([folded(m * column[:, None, :], 2) for column in q.unbind(2)], 2))
        q = torch.stack([folded(m * column[:, :, None], 1) for column in p.unbind(2)], 2)
    return torch.cat([p.flatten(1), q.flatten(1)], 1)


def _orthonormal(p: Tensor) -> Tensor:
    """Columns of ``[C, a, r]`` made orthonormal by Gram and Schmidt, twice; what depends on those before it becomes zero."""
    done: list[Tensor] = []
    for column in p.unbind(2):
        left = column
        for other in 2 * done:
            left = left - folded(left * other, 1)[:, None] * other
        before, after = (folded(v.square(), 1).sqrt()[:, None] for v in (column, left))
        done.append(torch.where(after > 1e-10 * before, left / after, 0))
    return torch.stack(done, 2)


def folded(x: Tensor, dim: int) -> Tensor:
    """Sums along ``dim``, of which there is one at least, by adding halves: in an order that depends on their number alone."""
    while (n := x.shape[dim]) > 1:
        half = n // 2
        odd = x.narrow(dim, n - 1, n % 2)
        x = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        x.narrow(dim, 0, n % 2).add_(odd)
    return x.squeeze(dim)
