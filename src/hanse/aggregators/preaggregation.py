"""Pre-aggregations: new rows out of the rows, before a rule. ``nnm(2) | krum(2)`` is nearest-neighbour mixing, then Krum.

Each is a matrix M that follows from the inner products G of the rows, so that those of the new rows are M G M^T, and a
combination c of new rows is the combination c M of the old ones: a rule on inner products reads the rows no more often for it.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from hanse.aggregators.base import Aggregator, Faulty, PreAggregation, need
from hanse.aggregators.gram import distances, one_thread, symmetric
from hanse.aggregators.rows import Rows
from hanse.core.streams import Streams


class nnm(PreAggregation):
    """Nearest-neighbour mixing: every row becomes the mean of the p - f rows nearest to it, itself among them.

    Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan: "Fixing by Mixing: A Recipe for Optimal Byzantine ML under
    Heterogeneity", AISTATS 2023, arXiv 2302.01772. Needs p > f. Of equally near rows the first count.
    """

    f: Faulty
    """Rows that may be anything."""

    def matrix(self, gram: Tensor) -> Tensor:
        p = len(gram)
        need(self, self.f, p, self.f + 1, "f+1")
        order = distances(gram).fill_diagonal_(-1).argsort(dim=1, stable=True)[:, : p - self.f]
        return torch.zeros_like(gram).scatter_(1, order, 1 / (p - self.f))


class bucketing(PreAggregation):
    """The means of buckets of rows, dealt out by chance; the last one may be smaller.

    Karimireddy, He, Jaggi: "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022, arXiv 2006.09365.
    The chance is drawn from the inner products of the rows, so the same rows give the same buckets.
    """

    size: PositiveInt = 2
    """Rows in a bucket."""

    def matrix(self, gram: Tensor) -> Tensor:
        p = len(gram)
        seed = hashlib.blake2b(gram.cpu().contiguous().numpy().tobytes(), digest_size=8).digest()
        order = torch.randperm(p, generator=Streams(int.from_bytes(seed, "little")).torch("bucketing")).to(gram.device)
        m = gram.new_zeros(-(-p // self.size), p)
        m[torch.arange(p, device=gram.device) // self.size, order] = 1
        return m / m.sum(1, keepdim=True)


class clipping(PreAggregation):
    """Rows that are longer than a bound become as long as the bound."""

    bound: PositiveFloat | None = None
    """Euclidean length; None: the median of the rows' lengths."""

    @property
    def centred(self) -> bool:
        return False

    def matrix(self, gram: Tensor) -> Tensor:
        length = gram.diagonal().clamp_min(0).sqrt()
        bound = length.quantile(0.5) if self.bound is None else self.bound
        return torch.where(length > bound, bound / length, 1).diag()


class series(PreAggregation):
    """Pre-aggregations one after another, written ``nnm(2) | bucketing(2)``."""

    mixings: Annotated[tuple[PreAggregation, ...], Field(min_length=1)]
    """In their order."""

    @property
    def centred(self) -> bool:
        return all(mixing.centred for mixing in self.mixings)

    def matrix(self, gram: Tensor) -> Tensor:
        total = torch.eye(len(gram)).to(gram)
        for mixing in self.mixings:
            total = mixing.matrix(symmetric(total @ gram @ total.T)) @ total
        return total

    def __str__(self) -> str:
        return " | ".join(map(str, self.mixings))

    __repr__ = __str__

    def full(self) -> str:
        return " | ".join(mixing.full() for mixing in self.mixings)

    @property
    def short_name(self) -> str:
        return "_".join(mixing.short_name for mixing in self.mixings)


class mixed(Aggregator):
    """A rule on rows that a pre-aggregation has made, written ``nnm(2) | krum(2)``.

    A new row weighs what those it is made of weigh.
    """

    before: PreAggregation
    """What makes the new rows."""
    rule: Aggregator
    """What aggregates them."""

    @property
    def centred(self) -> bool:
        return self.before.centred and self.rule.centred

    def aggregate(self, rows: Rows, weights: Tensor | None) -> Tensor | None:
        gram = rows.gram(self.centred)
        if gram is None:
            return None
        with one_thread():
            m = self.before.matrix(gram)
        return self.rule.aggregate(rows.mixed(m), None if weights is None else (m > 0).double() @ weights.double())

    def __str__(self) -> str:
        return f"{self.before} | {self.rule}"

    __repr__ = __str__

    def full(self) -> str:
        return f"{self.before.full()} | {self.rule.full()}"

    @property
    def short_name(self) -> str:
        return f"{self.before.short_name}_{self.rule.short_name}"
