"""Who gets which samples.

A partition lays the rows of a data set in client order and says how many each client has; the base class holds out each
client's test part. Everything is an array operation on row numbers, so a million clients cost a few integers each.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from hanse.core.errors import ConfigError, DataError
from hanse.core.part import Part
from hanse.core.samples import Samples
from hanse.core.streams import Streams
from hanse.data.task import Dataset, Split

COPY_BYTES = 64 << 20
"""Data up to this size are copied into client order, to be read faster; larger data stay where they are, behind an index."""

COUNTED_CLIENTS = 10_000
"""Class counts are kept for at most so many clients."""


class Partition(Part):
    """Base of all partitions."""

    kind: ClassVar[str] = "partition"
    abstract: ClassVar[bool] = True

    test: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of each client's samples held out for its own test part (rounded; at least one sample is left to train on)."""
    newcomers: NonNegativeInt = 0
    """Further clients, split off like the others, that take no part in training."""

    def deal(self, data: Dataset, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
        """Rows of ``data`` in client order, int64 ``[M]``, in random order within a client, and the size of each, ``[clients]``."""
        raise TypeError(f"{type(self).__name__} does not define deal")

    def domain(self, clients: Tensor) -> Tensor | None:
        """The domain of each client, int64 from 0 up; None where all data are alike."""
        return None

    def split(self, data: Dataset, clients: int, streams: Streams) -> Split:
        """Split ``data`` over ``clients`` clients (numbers 0 up) and the newcomers.

        Raises ``ConfigError`` when there are more clients than samples, ``DataError`` when a label has no name or a client would
        be left without a sample.
        """
        data.check()
        total = clients + self.newcomers
        if total > len(data.x):
            raise ConfigError(f"clients: {total} (newcomers included) is not allowed: the task has {len(data.x)} training samples")
        order, sizes = self.deal(data, total, streams)
        if int(sizes.min()) < 1:
            raise DataError(f"partition {self}: client {int(sizes.argmin())} of {total} has no training sample")
        end = int(sizes[:clients].sum())
        newcomers = None if not self.newcomers else samples(data, order[end:], sizes[clients:])
        order, sizes = order[:end], sizes[:clients]
        held = (sizes * self.test + 0.5).long().minimum(sizes - 1)
        train, test = order, order[:0]
        if self.test:
            left = torch.repeat_interleave(sizes.cumsum(0), sizes) - torch.arange(end)  # counts down to 1 within a client
            mine = left > torch.repeat_interleave(held, sizes)
            train, test = order[mine], order[~mine]
        groups = None
        if clients <= COUNTED_CLIENTS:
            owner = torch.repeat_interleave(torch.arange(clients), sizes - held)
            cells = torch.bincount(owner * len(data.names) + data.group[train], minlength=clients * len(data.names))
            groups = cells.view(clients, len(data.names))
        return Split(
            train=dataclasses.replace(samples(data, train, sizes - held), domains=self.domain(torch.arange(clients))),
            test=samples(data, test, held),
            test_x=data.test_x,
            test_y=data.test_y,
            names=data.names,
            groups=groups,
            newcomers=newcomers,
        )


def samples(data: Dataset, rows: Tensor, sizes: Tensor) -> Samples:
    """``rows`` of ``data``, which lie in client order, as the samples of clients of these ``sizes``."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    if data.x.nbytes + data.y.nbytes <= COPY_BYTES:
        return Samples(data.x[rows], data.y[rows], offsets)
    return Samples(data.x, data.y, offsets, rows)


def even(total: int, parts: int) -> Tensor:
    """``parts`` sizes that differ by at most one and add up to ``total``, int64."""
    cuts = torch.arange(parts + 1) * total // parts
    return cuts[1:] - cuts[:-1]


def shuffled(size: int, streams: Streams, purpose: str) -> Tensor:
    """A random order of ``size`` rows."""
    return torch.from_numpy(streams.numpy(purpose).permutation(size))


def gather(owner: Tensor, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
    """From the client of every sample (-1: nobody's) to what ``deal`` returns."""
    order = shuffled(len(owner), streams, "partition.order")
    order = order[owner[order] >= 0]
    return order[torch.argsort(owner[order], stable=True)], torch.bincount(owner[owner >= 0], minlength=clients)


class iid(Partition):
    """Samples dealt out at random, all clients equal but for a remainder of one."""

    def deal(self, data: Dataset, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
        return shuffled(len(data.x), streams, "partition"), even(len(data.x), clients)


class quantity(Partition):
    """Samples dealt out at random in log-normal sizes: every client gets one, the others go by weights ``exp(sigma z_i)``."""

    sigma: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Standard deviation of the logarithm of the weights; 0 makes all clients equal."""

    def deal(self, data: Dataset, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
        z = streams.normal("partition.sizes", torch.arange(clients))[:, 0].cpu()
        weight = (self.sigma * (z - z.max())).exp()
        cuts = (weight.cumsum(0) / weight.sum() * (len(data.x) - clients)).round().long()
        cuts[-1] = len(data.x) - clients
        sizes = torch.diff(cuts, prepend=torch.zeros(1, dtype=torch.long)) + 1
        return shuffled(len(data.x), streams, "partition"), sizes


class dirichlet(Partition):
    """Label skew: each class is divided over the clients in proportions drawn from a symmetric Dirichlet distribution.

    The variant of Yurochkin et al. (ICML 2019) and NIID-Bench (Li et al., ICDE 2022): one draw per class over the clients, so
    sizes differ too. Instead of redrawing until everyone has ``min_samples``, clients below it are filled up to it with random
    samples of the largest clients, which are cut down to a common level no lower than it.
    """

    alpha: Annotated[float, Field(gt=0, le=1e9)] = 0.3
    """Concentration: small values give each client few classes, large values approach ``iid``."""
    min_samples: PositiveInt = 1
    """Samples that every client has at least, its test part included."""

    def deal(self, data: Dataset, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
        if clients * self.min_samples > len(data.x):
            most = len(data.x) // clients
            raise ConfigError(
                f"dirichlet.min_samples: {self.min_samples} is not allowed: {clients} clients, at most {most} samples each"
            )
        shares = streams.numpy("partition").dirichlet(np.full(clients, self.alpha), len(data.names))
        by_class = shuffled(len(data.x), streams, "partition.classes")
        by_class = by_class[torch.argsort(data.group[by_class], stable=True)]
        owner = torch.empty_like(by_class)
        for rows, share in zip(
            torch.split(by_class, torch.bincount(data.group, minlength=len(shares)).tolist()), shares, strict=True
        ):
            edges = torch.from_numpy(share[:-1].cumsum())
            owner[rows] = torch.searchsorted(edges, (torch.arange(len(rows)).double() + 0.5) / max(1, len(rows)), right=True)
        order, sizes = gather(owner, clients, streams)
        lacking = (self.min_samples - sizes).clamp(min=0)
        if not bool(lacking.any()):
            return order, sizes
        given = _from_largest(sizes, int(lacking.sum()))
        left = torch.repeat_interleave(sizes.cumsum(0), sizes) - torch.arange(len(order))
        moved = order[left <= torch.repeat_interleave(given, sizes)]
        moved = moved[shuffled(len(moved), streams, "partition.moved")]
        owner[moved] = torch.repeat_interleave(torch.arange(clients), lacking)
        return gather(owner, clients, streams)


def _from_largest(sizes: Tensor, need: int) -> Tensor:
    """How many samples each client gives so that ``need`` come together and the largest clients end up level."""
    low, high = 0, int(sizes.max())  # the highest level that frees enough lies in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if int((sizes - middle).clamp(min=0).sum()) >= need else (low, middle)
    given = (sizes - low).clamp(min=0)
    spare = given.nonzero().squeeze(1)[: int(given.sum()) - need]
    given[spare] -= 1
    return given


class shards(Partition):
    """Pathological label skew (McMahan et al., AISTATS 2017): samples sorted by class, cut into equal shards, a few a client."""

    per_client: PositiveInt = 2
    """Shards per client; hence about as many classes."""

    def deal(self, data: Dataset, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
        pieces = clients * self.per_client
        if pieces > len(data.x):
            most = len(data.x) // clients
            raise ConfigError(f"shards.per_client: {self.per_client} is not allowed: {clients} clients, at most {most} shards each")
        by_class = shuffled(len(data.x), streams, "partition.classes")
        by_class = by_class[torch.argsort(data.group[by_class], stable=True)]
        holder = shuffled(pieces, streams, "partition") // self.per_client
        owner = torch.empty_like(by_class)
        owner[by_class] = torch.repeat_interleave(holder, even(len(data.x), pieces))
        return gather(owner, clients, streams)


class neighbouring(Partition):
    """Every client has some neighbouring classes, one further than the client before: ``i, i + 1, ...``, modulo their number.

    The split of Verbraeken, de Vos, Pouwelse: "Bristle", arXiv 2110.11006. A client's samples are in a random order but for taking
    its classes in turns, so that its test part has all of them alike.
    """

    classes: PositiveInt = 4
    """Classes of every client."""
    each: PositiveInt | None = None
    """Samples of each class that a client has, its test part included; None: a class is dealt evenly to all who have it."""

    def deal(self, data: Dataset, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
        count = len(data.names)
        if self.classes > count:
            raise ConfigError(f"neighbouring.classes: {self.classes} is not allowed: the task has {count}")
        has = (torch.arange(count) - torch.arange(clients)[:, None]) % count < self.classes
        sharers, available = has.sum(0), torch.bincount(data.group, minlength=count)
        if self.each is not None and bool((self.each * sharers > available).any()):
            most = int((available // sharers.clamp(min=1))[sharers > 0].min())
            raise ConfigError(
                f"neighbouring.each: {self.each} is not allowed: {clients} clients, at most {most} samples of a class"
            )
        order = shuffled(len(data.x), streams, "partition.classes")
        order = order[torch.argsort(data.group[order], stable=True)]
        kind = data.group[order]
        nth = torch.arange(len(order)) - (available.cumsum(0) - available)[kind]  # of its class
        if self.each is None:
            place = ((nth + 1) * sharers[kind] - 1).clamp(min=0) // available[kind]  # as ``even`` cuts
            turn = nth - place * available[kind] // sharers[kind].clamp(min=1)
        else:
            place, turn = nth // self.each, nth % self.each
        dealt = place < sharers[kind]
        order, kind, place, turn = order[dealt], kind[dealt], place[dealt], turn[dealt]
        owner = has.t().nonzero()[(sharers.cumsum(0) - sharers)[kind] + place, 1]
        mixed = shuffled(len(order), streams, "partition.order")
        mixed = mixed[torch.argsort(turn[mixed], stable=True)]
        mixed = mixed[torch.argsort(owner[mixed], stable=True)]
        return order[mixed], torch.bincount(owner, minlength=clients)


class natural(Partition):
    """The clients that the data come with (writers, hospitals, packages), in their own order.

    With fewer clients than there are owners, those with most samples take part and the samples of the others are left out.
    """

    def deal(self, data: Dataset, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
        if data.owner is None:
            raise ConfigError("partition: natural is not allowed: the task names no owners of its samples")
        sizes = torch.bincount(data.owner)
        owners = int((sizes > 0).sum())
        if clients > owners:
            raise ConfigError(f"clients: {clients} (newcomers included) is not allowed: the task has {owners} natural clients")
        chosen = torch.argsort(sizes, descending=True, stable=True)[:clients].sort().values
        number = torch.full_like(sizes, -1)
        number[chosen] = torch.arange(clients)
        return gather(number[data.owner], clients, streams)


class feature_shift(iid):
    """IID labels, but every client sees the world through its domain's eyes: client ``i`` is of domain ``i mod domains``.

    Domain 0 leaves samples as they are. The global test set is dealt over the domains evenly.
    """

    change: Literal["rotate", "noise", "contrast"] = "rotate"
    """rotate: pictures turned by 90 degrees times the domain; noise: normal noise added; contrast: faded towards the mean.

    The last two grow evenly to ``strength`` in the last domain."""
    domains: PositiveInt = 4
    """Number of domains; at most 4 for rotate."""
    strength: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    """Standard deviation of the noise, or share of contrast lost, in the last domain."""

    def domain(self, clients: Tensor) -> Tensor:
        """The domain of each client."""
        return clients % self.domains

    def split(self, data: Dataset, clients: int, streams: Streams) -> Split:
        if self.change == "rotate" and self.domains > 4:
            raise ConfigError(f"feature_shift.domains: {self.domains} is not allowed: a picture has 4 rotations by 90 degrees")
        if self.change == "contrast" and self.strength > 1:
            raise ConfigError(f"feature_shift.strength: {self.strength} is not allowed: at most 1 for contrast")
        if not data.x.is_floating_point():
            raise DataError(f"feature_shift: samples of type {data.x.dtype} cannot be changed; only real numbers can")
        order, sizes = self.deal(data, clients + self.newcomers, streams)
        domain = torch.empty_like(order)
        domain[order] = torch.repeat_interleave(torch.arange(len(sizes)), sizes) % self.domains
        x = self._changed(data.x, domain, streams, "partition.noise")
        test_domain = shuffled(len(data.test_x), streams, "partition.domains") % self.domains
        test_x = self._changed(data.test_x, test_domain, streams, "partition.test_noise")
        return super().split(dataclasses.replace(data, x=x, test_x=test_x), clients, streams)

    def _changed(self, x: Tensor, domain: Tensor, streams: Streams, purpose: str) -> Tensor:
        x = x.clone()
        level = self.strength * domain / max(1, self.domains - 1)
        level = level.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        match self.change:
            case "noise":
                return x.add_(torch.randn(x.shape, generator=streams.torch(purpose), dtype=x.dtype) * level)
            case "contrast":
                return x.lerp_(x.mean(), level)
            case "rotate":
                pictures = _as_pictures(x)
                for d in range(1, self.domains):
                    pictures[domain == d] = torch.rot90(pictures[domain == d], d, (-2, -1))
                return x


def _as_pictures(x: Tensor) -> Tensor:
    """A view ``[..., side, side]``: pictures as they are, flat vectors as squares."""
    side = math.isqrt(x.shape[-1])
    pictures = x.view(len(x), side, side) if x.dim() == 2 and side * side == x.shape[-1] else x
    if pictures.dim() < 3 or pictures.shape[-1] != pictures.shape[-2]:
        raise DataError(f"feature_shift: samples of shape {tuple(x.shape[1:])} cannot be rotated; square pictures are needed")
    return pictures
