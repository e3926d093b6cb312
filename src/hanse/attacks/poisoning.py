"""Liars that train as they should, on data that they have changed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from hanse.attacks.base import Attack
from hanse.core.errors import ConfigError
from hanse.core.samples import Samples
from hanse.core.streams import Streams


def owned(samples: Samples, clients: Tensor) -> Tensor:
    """Places, in client order, of the samples of ``clients`` (bool ``[clients]``): int64, rising."""
    return torch.repeat_interleave(clients.cpu(), samples.counts()).nonzero()[:, 0] + samples.offsets[0]


def changed(samples: Samples, places: Tensor, y: Tensor, x: Tensor | None = None) -> Samples:
    """``samples`` with other ``y`` ``[M]`` and, where given, ``x`` ``[M, ...]`` at ``places`` in client order, int64 ``[M]``.

    Labels are copied, and ``x`` if it changes; all other places keep their bits. If one of the rows stands at a second place as
    well, the changed ones become new rows at the end, which copies both.
    """
    if not len(places):
        return samples
    index = samples.index
    rows = places if index is None else index[places]
    if index is not None and bool((torch.bincount(index)[rows] > 1).any()):
        fresh = samples.take(places)[0] if x is None else x
        ends = torch.arange(len(samples.x), len(samples.x) + len(places))
        both = torch.cat([samples.x, fresh]), torch.cat([samples.y, y])
        return replace(samples, x=both[0], y=both[1], index=index.index_copy(0, places, ends))
    rows = rows.to(samples.y.device)
    new = samples.x if x is None else samples.x.index_copy(0, rows, x)
    return replace(samples, x=new, y=samples.y.index_copy(0, rows, y))


def classes(attack: Attack, y: Tensor) -> int:
    """Number of classes in the labels ``y`` ``[N]``; raises ``ConfigError`` where they are not classes."""
    if y.dim() != 1 or y.is_floating_point():
        raise ConfigError(
            f"{type(attack).__name__}: labels of type {y.dtype} and shape {tuple(y.shape)} are not allowed: one class each"
        )
    return int(y.max()) + 1


def check_class(attack: Attack, field: str, number: int, y: Tensor) -> None:
    """Raise ``ConfigError`` unless ``number`` is one of the classes of ``y``."""
    if number >= (count := classes(attack, y)):
        named = f"{type(attack).__name__}.{field}"
        raise ConfigError(f"{named}: {number} is not allowed: the data have classes 0 to {count - 1}")


class label_flip(Attack):
    """Trains on wrong labels: ``C - 1 - y`` for y of C classes, or ``target`` where y is ``source``.

    With ``source=1, target=7`` it is that of Xu, Lyu, "A Reputation Mechanism Is All You Need", arXiv 2011.10464. It has succeeded
    where the model takes ``source`` for ``target``; without these there is nothing to measure but the accuracy.
    """

    source: NonNegativeInt | None = None
    """The one class that is given out for another; None: all are."""
    target: NonNegativeInt | None = None
    """What it is given out for; both or neither have to be given."""

    @model_validator(mode="after")
    def _two_classes(self) -> Self:
        if (self.source is None) != (self.target is None):
            raise ValueError("source and target have to be given both or not at all")
        if self.source is not None and self.source == self.target:
            raise ValueError("source and target have to differ")
        return self

    def poison(self, samples: Samples, liars: Tensor, streams: Streams) -> Samples:
        """Changes labels; raises ``ConfigError`` where these are not classes, or not the named ones."""
        count, places = classes(self, samples.y), owned(samples, liars)
        y = samples.y[(places if samples.index is None else samples.index[places]).to(samples.y.device)]
        if self.source is None or self.target is None:
            return changed(samples, places, count - 1 - y)
        check_class(self, "source", self.source, samples.y)
        check_class(self, "target", self.target, samples.y)
        return changed(samples, places, y.masked_fill(y == self.source, self.target))

    def probe(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.source is None or self.target is None:
            return None
        shown = torch.eq(y, self.source)
        return (x[shown], torch.full_like(y[shown], self.target)) if bool(shown.any()) else None


class backdoor(Attack):
    """Puts a bright square into a corner of some of its pictures and calls these ``target``, so that the model learns the sign.

    Gu, Dolan-Gavitt, Garg: "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", arXiv 1708.06733. The
    square is at the bottom right, in the largest value found in the data, in all channels. It has succeeded where the model takes
    pictures of other classes with the square for ``target``.
    """

    target: NonNegativeInt = 0
    """The class that pictures with the square are given out for."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of each liar's samples that are changed, rounded to whole samples."""
    size: PositiveInt = 3
    """Side of the square in pixels."""

    def poison(self, samples: Samples, liars: Tensor, streams: Streams) -> Samples:
        """Changes pictures and labels; raises ``ConfigError`` where samples are not pictures ``[N, H * H]`` or ``[N, K, H, W]`` at
        least as large as the square, or labels not classes.
        """
        check_class(self, "target", self.target, samples.y)
        places = self._chosen(samples, liars, streams)
        x, y = samples.take(places)
        return changed(samples, places, torch.full_like(y, self.target), self.marked(x, samples.x))

    def _chosen(self, samples: Samples, liars: Tensor, streams: Streams) -> Tensor:
        """Places of the samples that are changed: of each liar as many as have to be, in a random order of all of its samples."""
        ids = liars.cpu().nonzero()[:, 0]
        counts = samples.counts(ids)
        most = int(counts.max()) if len(ids) else 0
        keys = streams.uniform("attack.backdoor.samples", ids, 0, most).cpu()
        column = torch.arange(most)
        order = keys.masked_fill(column >= counts[:, None], math.inf).argsort(dim=1, stable=True)  # padding comes last
        return (samples.offsets[ids][:, None] + order)[column < (counts * self.rate + 0.5).long()[:, None]]

    def marked(self, x: Tensor, data: Tensor) -> Tensor:
        """Puts the square into the pictures ``x``, in the largest value of ``data``; raises ``ConfigError`` as ``poison``."""
        side = math.isqrt(x.shape[-1])
        flat = x.dim() == 2 and side * side == x.shape[-1]
        if not (x.is_floating_point() and (flat or x.dim() == 4)):
            kind = f"samples of type {x.dtype} and shape {tuple(x.shape[1:])}"
            raise ConfigError(
                f"backdoor: {kind} are not allowed: only pictures [channels, height, width], or square ones laid flat"
            )
        height, width = (side, side) if flat else x.shape[-2:]
        if self.size > min(height, width):
            raise ConfigError(f"backdoor.size: {self.size} is not allowed: the pictures are {height}x{width}")
        pictures = x.view(len(x), height, width) if flat else x
        pictures[..., -self.size :, -self.size :] = data.max()
        return x

    def probe(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        other = y != self.target
        return (self.marked(x[other], x), torch.full_like(y[other], self.target)) if bool(other.any()) else None
