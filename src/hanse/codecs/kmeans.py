"""Quantisation by k-means on a line: a codebook that fits the numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hanse.codecs.base import Sending
from hanse.codecs.chain import Load, Quantise
from hanse.codecs.quantise import masked, quantised


class kmeans(Quantise):
    """A codebook of ``centres`` numbers by k-means on a line.

    It starts from one mean for each sign, splits the clusters with the largest errors until there are enough, and moves borders and
    means by Lloyd's steps in between; so the error is never more than that of the two means (Lloyd, "Least squares quantization in
    PCM", 1982; the splitting is that of Linde, Buzo and Gray, 1980).
    """

    centres: Annotated[int, Field(ge=1, le=256)] = 2
    """Numbers in the codebook."""

    @property
    def levels(self) -> int:
        return self.centres

    def columns(self, count: int) -> int:
        return self.centres

    def forward(self, load: Load, sending: Sending) -> Load:
        x = load.values
        table, borders = codebook(masked(load, torch.inf), load.lengths.to(x.device), self.centres)
        symbols = torch.searchsorted(borders, x.double().contiguous(), right=True).to(torch.uint8)
        symbols = symbols if load.there is None else symbols * load.there
        return replace(load, symbols=symbols, levels=self.centres, table=table.to(x.dtype))

    def backward(self, load: Load) -> Load:
        symbols, table = quantised(load)
        return replace(load, values=table.gather(1, symbols.long()), symbols=None, levels=0, table=None)


ONE_BY_ONE = 16
"""Clusters up to which they are split one at a time, the worst first; more are split as many as there are at once, for speed."""
STEPS = 20
"""Most of Lloyd's steps between two splits."""


def codebook(x: Tensor, counts: Tensor, centres: int) -> tuple[Tensor, Tensor]:
    """Centres ``[C, k]``, rising, and the borders between them ``[C, k - 1]``, double precision, of the first ``counts`` numbers of
    each row ``[C, m]``, of which the rest is infinite.
    """
    x = x.double().sort(1).values
    there = torch.arange(x.shape[1], device=x.device) < counts[:, None]
    finite = torch.where(there, x, 0)
    sums, squares = (_integral(t, finite < 0) for t in (finite, finite.square()))
    zero, end = torch.zeros_like(counts)[:, None], counts[:, None]
    cuts = torch.cat([zero, end], 1)
    if centres > 1:
        middle = torch.searchsorted(x, torch.zeros(len(x), 1, dtype=x.dtype, device=x.device))
        one_sign = (middle == 0) | (middle == end)
        middle = torch.where(one_sign, torch.searchsorted(x, _means(x, sums, cuts)), middle)
        cuts = torch.cat([zero, middle, end], 1)
    while True:
        cuts, means = _lloyd(x, sums, cuts)
        have = means.shape[1]
        if have == centres:
            means = _means(x, sums, _distinct(x, there, cuts))
            return means, (means[:, 1:] + means[:, :-1]) / 2
        size = cuts.diff(dim=1)
        error = squares.gather(1, cuts[:, 1:]) - squares.gather(1, cuts[:, :-1]) - means.square() * size
        error = error.masked_fill(_single(x, cuts), -torch.inf)
        new = 1 if have < ONE_BY_ONE else min(have, centres - have)
        split = error.argsort(dim=1, descending=True, stable=True)[:, :new]  # the same ones whoever else is there
        middle = torch.searchsorted(x, means.gather(1, split)).clamp(cuts.gather(1, split), cuts.gather(1, split + 1))
        cuts = torch.cat([cuts, middle], 1).sort(1).values


def _integral(x: Tensor, negative: Tensor) -> Tensor:
    """Sums of ``x`` from zero outwards, ``[C, m + 1]``: their differences are then no less exact where numbers are small."""
    up, down = torch.where(negative, 0, x), torch.where(negative, x, 0).flip(1)
    up, down = (torch.nn.functional.pad(t.cumsum(1), (1, 0)) for t in (up, down))
    return up - down.flip(1)


def _single(x: Tensor, cuts: Tensor) -> Tensor:
    """Which clusters of the sorted ``x`` hold at most one number, however often, bool ``[C, k]``."""
    if not x.shape[1]:
        return torch.ones_like(cuts[:, 1:], dtype=torch.bool)
    first, last = (x.gather(1, t.clamp(0, x.shape[1] - 1)) for t in (cuts[:, :-1], cuts[:, 1:] - 1))
    return (first == last) | (cuts.diff(dim=1) == 0)


def _distinct(x: Tensor, there: Tensor, cuts: Tensor) -> Tensor:
    """``cuts``, or a cluster for each number of the sorted ``x`` in the rows where there are enough of them."""
    new = there & (torch.nn.functional.pad(x, (1, 0), value=-torch.inf)[:, :-1] != x)
    which = new.cumsum(1)
    enough = which[:, -1:] < cuts.shape[1] if x.shape[1] else torch.zeros_like(cuts[:, :1], dtype=torch.bool)
    which = torch.where(new, which - 1, cuts.shape[1] - 1).clamp(max=cuts.shape[1] - 1)
    at = torch.arange(x.shape[1], device=x.device).expand(which.shape)
    starts = cuts[:, -1:].expand(cuts.shape).scatter_reduce(1, which, torch.where(new, at, at + x.shape[1]), "amin")
    return torch.where(enough, torch.cat([starts[:, :-1], cuts[:, -1:]], 1), cuts)


def _lloyd(x: Tensor, sums: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Borders between clusters of the sorted ``x``, ``[C, k + 1]``, moved until they stay, and the clusters' means ``[C, k]``."""
    for _ in range(STEPS):
        means = _means(x, sums, cuts)
        moved = torch.searchsorted(x, (means[:, 1:] + means[:, :-1]) / 2)
        moved = torch.cat([cuts[:, :1], torch.minimum(moved, cuts[:, -1:]), cuts[:, -1:]], 1)
        if torch.equal(moved, cuts):
            break
        cuts = moved
    return cuts, _means(x, sums, cuts)


def _means(x: Tensor, sums: Tensor, cuts: Tensor) -> Tensor:
    """Mean of each cluster; of an empty one, the number at its border."""
    size = cuts.diff(dim=1)
    total = sums.gather(1, cuts[:, 1:]) - sums.gather(1, cuts[:, :-1])
    if not x.shape[1]:
        return torch.zeros_like(total)
    border = x.gather(1, cuts[:, :-1].clamp(max=x.shape[1] - 1))
    border = torch.where(torch.isfinite(border), border, x.gather(1, (cuts[:, -1:] - 1).clamp(min=0)))
    return torch.where(size > 0, total / size.clamp(min=1), torch.where(torch.isfinite(border), border, 0))
