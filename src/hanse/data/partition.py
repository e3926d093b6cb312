"""Who gets which samples."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hanse.core.errors import DataError
from hanse.core.part import Part
from hanse.core.samples import Samples
from hanse.core.streams import Streams
from hanse.data.task import Dataset, Split


class Partition(Part):
    """Base of all partitions: a client for every sample, then a train and a test part for every client."""

    kind: ClassVar[str] = "partition"
    abstract: ClassVar[bool] = True

    def assign(self, data: Dataset, clients: int, streams: Streams) -> Tensor:
        """The client of every sample, int64 ``[N]``."""
        raise TypeError(f"{type(self).__name__} does not define assign")

    def split(self, data: Dataset, clients: int, streams: Streams) -> Split:
        """PLACEHOLDER, see brief."""
        owner = self.assign(data, clients, streams)
        index = torch.argsort(owner, stable=True)
        counts = torch.bincount(owner, minlength=clients)
        if int(counts.min()) == 0:
            raise DataError(f"partition {self}: client {int(counts.argmin())} has no data")
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        groups = torch.zeros(clients, len(data.names), dtype=torch.long)
        groups.index_put_((owner, data.group), torch.ones_like(owner), accumulate=True)
        train = Samples(data.x[index], data.y[index], offsets)
        return Split(train, train, data.test_x, data.test_y, data.names, groups)


class iid(Partition):
    """Samples dealt out at random, all clients equal but for a remainder of one."""

    def assign(self, data: Dataset, clients: int, streams: Streams) -> Tensor:
        order = torch.from_numpy(streams.numpy("partition").permutation(len(data.x)))
        owner = torch.empty(len(data.x), dtype=torch.long)
        owner[order] = torch.arange(len(data.x)) * clients // len(data.x)
        return owner


class dirichlet(Partition):
    """PLACEHOLDER."""

    alpha: Annotated[float, Field(gt=0)] = 0.3
    """Concentration."""

    def assign(self, data: Dataset, clients: int, streams: Streams) -> Tensor:
        rng = streams.numpy("partition")
        owner = torch.empty(len(data.x), dtype=torch.long)
        for g in range(len(data.names)):
            rows = (data.group == g).nonzero().squeeze(1)
            share = rng.dirichlet([self.alpha] * clients)
            owner[rows] = torch.from_numpy(rng.choice(clients, len(rows), p=share))
        short = [c for c in range(clients) if not (owner == c).any()]
        for c in short:
            owner[int(rng.integers(len(owner)))] = c
        return owner
