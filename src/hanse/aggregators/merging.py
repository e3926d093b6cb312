"""What a node makes of its own model and those it has received: the peers' side of aggregation.

``variance_corrected`` is from Tian, Al-Ars, Kitsak, Hofstee: "Vanishing Variance Problem in Fully Decentralized Neural-Network
Systems", 2024, arXiv 2404.04616:

    A_l = w_ii W_i^l + sum_j w_ij W_j^l                                                          every tensor l
    A_l <- (A_l - mean(A_l)) sqrt((target_l + eps) / (var(A_l) + eps)) + mean(A_l)               every corrected one

Averaging models that have nothing to do with each other divides the variance of their weights by up to their number, and networks
whose weights are too small do not learn. Our choices, where the authors' two programs differ: the variance over all entries of a
tensor (divided by their number), eps = 0, and weights of rank 2 and more alone, because biases and scales of norm layers have small
variances that mean nothing.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from hanse.aggregators.base import Aggregator
from hanse.core.layout import Layout
from hanse.core.part import Part
from hanse.topologies import Mixing

LEAST = 1e-12
"""Variance below which a tensor is taken for constant and left as it is; a single number has none."""


class Merge(Part):
    """Base of all merges."""

    kind: ClassVar[str] = "merge"
    abstract: ClassVar[bool] = True

    def __call__(self, own: Tensor, received: Tensor, mixing: Mixing, layout: Layout) -> Tensor:
        """Every node's new model ``[N, P]``: row i of ``own`` and the rows of ``received`` that ``mixing`` says i has."""
        raise TypeError(f"{type(self).__name__} does not define __call__")


class average(Merge):
    """The weighted mean: one row of the mixing matrix a node."""

    def __call__(self, own: Tensor, received: Tensor, mixing: Mixing, layout: Layout) -> Tensor:
        return mixing.mix(own, received)


class variance_corrected(Merge):
    """The weighted mean, scaled tensor by tensor to the variance that single models have."""

    target: Literal["others", "own", "both"] = "others"
    """Whose variance: the mean of the received models', one's own, or both weighted as the models are (the paper's follow-beta)."""
    skip: tuple[str, ...] = ()
    """Name patterns of tensors that are only averaged."""
    eps: NonNegativeFloat = 0.0
    """Added to both variances; it weakens the correction of tensors with smaller ones."""

    def __call__(self, own: Tensor, received: Tensor, mixing: Mixing, layout: Layout) -> Tensor:
        mixed, alone = mixing.mix(own, received), (mixing.own == 1)[:, None]
        before, arrived = layout.views(own), layout.views(received)
        for name, tensor in layout.views(mixed).items():
            if tensor.dim() < 3 or any(fnmatchcase(name, pattern) for pattern in self.skip):
                continue
            match self.target:
                case "others":
                    target = mixing.average(variances(arrived[name]))
                case "own":
                    target = variances(before[name])
                case "both":
                    target = mixing.mix(variances(before[name]), variances(arrived[name]))
            a, variance = tensor.view(len(tensor), -1), variances(tensor)
            mean, scale = a.mean(1, keepdim=True), ((target + self.eps) / (variance + self.eps)).sqrt()
            a.copy_(torch.where(alone | (variance < LEAST), a, (a - mean) * scale + mean))
        return mixed


def variances(tensors: Tensor) -> Tensor:
    """Over all entries of each node's tensor, ``[N, ...]`` to ``[N, 1]``; torch's own ``var`` takes ten times as long."""
    flat = tensors.flatten(1)
    return (flat - flat.mean(1, keepdim=True)).square_().mean(1, keepdim=True)


class robust(Merge):
    """An aggregator at every node, over its own model and those it has received."""

    rule: Aggregator
    """How the models become one, e.g. krum(1)."""

    def __call__(self, own: Tensor, received: Tensor, mixing: Mixing, layout: Layout) -> Tensor:
        merged, ends = own.clone(), mixing.offsets.tolist()
        for i in mixing.degrees.nonzero().squeeze(1).tolist():
            near = mixing.neighbours[ends[i] : ends[i + 1]]
            merged[i] = self.rule(torch.cat([own[i : i + 1], received[near]]))
        return merged
