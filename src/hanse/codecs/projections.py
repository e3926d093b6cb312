"""Random projections: a few coordinates of a vector, and a seed from which the reader draws the directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from hanse.codecs.base import Sending
from hanse.codecs.chain import Load, Select
from hanse.codecs.lowrank import folded
from hanse.codecs.sparse import words

PIECE = 1 << 12
"""Entries whose directions are in memory at a time."""
RIDGE = 1e-9
"""What directions that depend on each other, as they may in short layers, are divided by, in squared lengths of a direction."""


class projections(Select):
    """The vector's projection on the span of ``count`` random directions of plus and minus ones: as many numbers, and eight bytes.

        c = (D^T D)^-1 D^T x          arrives: D c,     D [n, count] by the message's seed

    Least squares, not D D^T x / count: that is right in the mean, but off by n / count times the vector, while the projection is
    never longer than the vector and so goes with error feedback; in the mean it is count / n of the vector. A random subspace as in
    Li, Farkhoor, Liu, Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018, arXiv 1804.08838; seeds and
    scalars as in FedKSeed (Qin et al., ICML 2024, arXiv 2312.06353). Layers of at most ``count`` entries are sent as they are.
    """

    count: PositiveInt = 16
    """Directions, and numbers sent."""
    drawn: ClassVar[bool] = True

    def most(self, shape: tuple[int, ...]) -> int:
        return min(self.count, torch.Size(shape).numel())

    def forward(self, load: Load, sending: Sending) -> Load:
        seeds = sending.seeds.to(load.values.device)
        load = replace(load, seeds=seeds)
        if load.size <= self.count:
            return load
        dots = torch.zeros(len(seeds), self.count, dtype=torch.float64, device=seeds.device)
        gram = torch.diag_embed(torch.full_like(dots, RIDGE * load.size))
        for where, directions in self._directions(load, torch.float64):
            dots += folded(load.values[:, where].double()[:, :, None] * directions, 1)
            gram += directions.transpose(1, 2) @ directions  # whole numbers, so in whatever order they are added
        found = torch.linalg.solve(gram, dots[:, :, None])[:, :, 0]
        return replace(load, values=found.to(load.values.dtype))

    def backward(self, load: Load) -> Load:
        assert load.seeds is not None
        if load.size <= self.count:
            return replace(load, seeds=None)
        found = load.values.new_empty(len(load.values), load.size)
        for where, directions in self._directions(load, load.values.dtype):
            found[:, where] = folded(directions * load.values[:, None, :], 2)
        return replace(load, values=found, seeds=None)

    def _directions(self, load: Load, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Some entries at a time, and their part of the directions ``[C, entries, count]``: a bit for each."""
        assert load.seeds is not None
        bit = torch.arange(32, device=load.seeds.device)
        for start in range(0, load.size, PIECE):
            n = min(PIECE, load.size - start)
            drawn = [words(load.seeds, f"{load.name}/{k}", n, start) for k in range(-(-self.count // 32))]
            bits = torch.cat([word[:, :, None] >> bit & 1 for word in drawn], 2)[:, :, : self.count]
            yield slice(start, start + n), bits.to(dtype).mul_(2).sub_(1)
