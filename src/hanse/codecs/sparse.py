"""Sparsification: send some of the entries and say, or let the reader draw, which."""

from __future__ import annotations

import zlib
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat
from torch import Tensor

from hanse.codecs.base import Links, Sending
from hanse.codecs.chain import Load, Select
from hanse.core.streams import MASK, key, philox

Fraction = Annotated[float, Field(gt=0, le=1)]

PIECE = 1 << 16
"""Entries that are worked on together, so that they stay in a core's cache."""
LONG = 1 << 16
"""Entries from which on a row is searched by a threshold guessed from some of them."""


class Sparse(Select):
    """Base of the stages that send places and values; what is not sent arrives as zero."""

    abstract: ClassVar[bool] = True
    placed: ClassVar[bool] = True
    ragged: ClassVar[bool] = True

    def backward(self, load: Load) -> Load:
        assert load.places is not None
        values, ragged = load.values, load.counts is not None
        dense = values.new_zeros(len(values), load.size + ragged)
        dense.scatter_(1, load.places, values)
        return replace(load, values=dense[:, : load.size], places=None, counts=None)


class topk(Sparse):
    """Keep the ``fraction`` of entries of largest magnitude; of equal ones those that come first."""

    fraction: Fraction = 0.1
    """Share of entries kept, unless the server allots each client its own."""
    only: dict[str, Fraction] = Field(default={})
    """After ``layers``: other shares, for all clients, of those whose names match a pattern, as in {'head.*': 1}."""
    rounding: Literal["down", "up"] = "down"
    """down: but at least one entry is sent; up: none where the share is 0."""

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(self.only)

    def forward(self, load: Load, sending: Sending) -> Load:
        own = next((f for pattern, f in self.only.items() if fnmatchcase(load.name, pattern)), None)
        if sending.share is None or own is not None or not load.size:
            count = self._count(torch.tensor(own or self.fraction, dtype=torch.float64), load.size)
            return replace(load, places=(at := largest(load.values, int(count))), values=load.values.gather(1, at))
        counts = self._count(sending.share, load.size)
        most = largest(load.values, int(counts.max()))
        rank = load.values.gather(1, most).abs().argsort(dim=1, descending=True, stable=True)
        surplus = torch.arange(most.shape[1]) >= counts[:, None]
        places = most.gather(1, rank).masked_fill(surplus.to(most.device), load.size).sort(1).values
        values = torch.where(places < load.size, load.values.gather(1, places.clamp(max=load.size - 1)), 0)
        return replace(load, places=places, values=values, counts=counts)

    def _count(self, share: Tensor, size: int) -> Tensor:
        return _count(share, size) if self.rounding == "down" else (share * size - 1e-9).ceil().long().clamp(0, size)


class bcrs(topk):
    """Top-k whose share follows the client's link, so that all uploads of a cohort end together (bandwidth-aware ratios).

        T_i(CR) = L_i + entry P CR / B_i;   T* = max_i T_i(CR*);   CR_i = clip((T* - L_i) B_i / (entry P), CR*, 1)

    Tang et al.: "Bandwidth-Aware and Overlap-Weighted Compression for Communication-Efficient Federated Learning", 2024,
    arXiv 2408.14736. CR* is ``fraction``; L is latency and B bytes per second to the server, as the fleet declares them. The round
    takes as long as with ``topk`` at CR*, but more is sent. ``layers`` and a quantiser or coder go with it as with ``topk``. That a
    kept entry costs its place as well is our choice; training time does not count. A cohort is whom one ``send`` of the schedule
    goes to: clients that are asked one by one get CR*. The times are those of rules that send one vector of the model's size.
    """

    fraction: Fraction = 0.1
    """The ratio CR*: share of entries kept by the slowest client, and by all where nothing takes time."""
    entry: PositiveFloat = 8.0
    """Bytes a kept entry costs: four for its place and four for its value, less with a quantiser or coder."""

    def allot(self, links: Links, size: int) -> Tensor:
        whole = self.entry * size
        bench = (links.latency + whole * self.fraction / links.up).amax()
        share = (bench - links.latency) * links.up / whole
        return torch.where(share.isnan(), self.fraction, share).clamp(self.fraction, 1)


def _count(share: Tensor, size: int) -> Tensor:
    """How many of ``size`` entries a share is, int64."""
    return (share * size + 1e-9).floor().long().clamp(min(1, size), size)


def largest(rows: Tensor, k: int) -> Tensor:
    """Places of the ``k`` entries of largest magnitude of each row ``[C, n]``, of equals the first; rising, int64 ``[C, k]``."""
    if k in (0, rows.shape[1]) or not len(rows):
        return torch.arange(k, device=rows.device).expand(len(rows), k)
    if rows.device.type == "cpu" and rows.shape[1] >= LONG and 4 * k <= rows.shape[1]:
        return torch.from_numpy(np.stack([_largest_of_many(row, k) for row in rows.numpy()]))
    return _top(rows.abs(), k)


def _top(magnitude: Tensor, k: int) -> Tensor:
    """``largest`` of numbers that are not negative."""
    cut = magnitude.shape[1] - k
    if magnitude.device.type == "cpu":
        last = torch.from_numpy(np.partition(magnitude.numpy(), cut, axis=1)[:, cut : cut + 1])
    else:  # which of equals it takes is left open, what they are is not
        last = magnitude.topk(k, 1).values.amin(1, keepdim=True)
    chosen = magnitude >= last
    if int(chosen.sum()) > k * len(magnitude):
        equal = magnitude == last
        chosen = magnitude > last
        chosen |= equal & (equal.cumsum(1) <= k - chosen.sum(1, keepdim=True))
    return chosen.nonzero()[:, 1].view(len(magnitude), k)


def _largest_of_many(row: NDArray[Any], k: int) -> NDArray[np.int64]:
    """``_top`` of one long row ``[n]``: most entries are smaller than a guess of the k-th largest and need not be sorted.

    Piece by piece, so that what is compared is still in the cache.
    """
    sample = np.abs(row[:: len(row) // 8192])
    wanted = len(sample) * k / len(row)
    rank = min(len(sample), int(wanted + 4 * wanted**0.5) + 2)  # four standard deviations: the guess is too high once in 30,000
    guess = np.partition(sample, len(sample) - rank)[len(sample) - rank]
    pieces = (slice(at, at + PIECE) for at in range(0, len(row), PIECE))
    candidates = np.concatenate([np.flatnonzero(np.abs(row[piece]) >= guess) + piece.start for piece in pieces])
    if len(candidates) < k:
        candidates = np.arange(len(row))
    magnitude = np.abs(row[candidates])
    last = np.partition(magnitude, len(magnitude) - k)[len(magnitude) - k]
    above = magnitude > last
    equal = np.flatnonzero(magnitude == last)[: k - np.count_nonzero(above)]
    above[equal] = True
    places: NDArray[np.int64] = candidates[above]
    return places


class threshold(Sparse):
    """Keep the entries whose magnitude is at least ``value``, or that many times the layer's root mean square."""

    value: PositiveFloat = 1.0
    """Smallest magnitude kept."""
    relative: bool = False
    """Whether ``value`` counts in root mean squares of the layer."""

    def forward(self, load: Load, sending: Sending) -> Load:
        x = load.values
        limit = self.value * x.double().square().mean(1, keepdim=True).sqrt() if self.relative else self.value
        chosen = x.abs() >= limit
        counts = chosen.sum(1)
        most = int(counts.max()) if len(counts) else 0
        places = torch.where(chosen, torch.arange(load.size, device=x.device), load.size).sort(1).values[:, :most]
        values = torch.where(places < load.size, x.gather(1, places.clamp(max=max(load.size - 1, 0))), 0)
        return replace(load, places=places, values=values, counts=counts.cpu())


class randomk(Select):
    """Keep a random ``fraction`` of the entries, which the reader draws for itself from the message's seed of eight bytes.

    An entry is kept if its random number is among the smallest. ``unbiased`` divides what is kept by the fraction, so that the mean
    over draws is the vector itself (Stich et al., "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599).
    """

    fraction: Fraction = 0.1
    """Share of entries kept, rounded down but at least one."""
    unbiased: bool = False
    """Scale up what is kept; not together with error feedback, which does without."""
    drawn: ClassVar[bool] = True

    @property
    def corrects(self) -> bool:
        return self.unbiased

    def most(self, shape: tuple[int, ...]) -> int:
        size = torch.Size(shape).numel()
        return int(_count(torch.tensor(self.fraction, dtype=torch.float64), size))

    def forward(self, load: Load, sending: Sending) -> Load:
        seeds = sending.seeds.to(load.values.device)
        load = replace(load, seeds=seeds)
        values = load.values.gather(1, at := self.places(load))
        if self.unbiased:
            values = values * (load.size / max(1, at.shape[1]))
        return replace(load, values=values)

    def places(self, load: Load) -> Tensor:
        assert load.seeds is not None
        return words(load.seeds, load.name, load.size).argsort(dim=1, stable=True)[:, : self.most(load.shape)].sort(1).values

    def backward(self, load: Load) -> Load:
        dense = load.values.new_zeros(len(load.values), load.size).scatter_(1, self.places(load), load.values)
        return replace(load, values=dense, seeds=None)


def words(seeds: Tensor, name: str, n: int, start: int = 0) -> Tensor:
    """32-bit words int64 ``[C, n]`` that follow from a message's seed and the layer's name, from the ``start``-th on, which is a
    multiple of 4.
    """
    block, layer = torch.arange(-(-n // 4), device=seeds.device), torch.tensor(zlib.crc32(name.encode()), device=seeds.device)
    block += start // 4
    out = philox((seeds & MASK)[:, None], (seeds >> 32 & MASK)[:, None], block, layer, key(0, "codec"))
    return torch.stack([word.expand(len(seeds), len(block)) for word in out], -1).flatten(1)[:, :n]
