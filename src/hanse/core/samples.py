"""The samples of all clients side by side, and the order in which clients go through them.

No object per client: client ``i`` owns the rows ``index[offsets[i] : offsets[i + 1]]`` of ``x`` and ``y`` (or those rows
themselves when the data already lie in client order), so a million clients are one array of offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanse.core.streams import MASK, Streams

Order = NDArray[np.int64]


class Batch(NamedTuple):
    """One local step of ``C`` clients: ``x`` ``[C, B, ...]``, ``y`` ``[C, B, ...]``.

    ``weight`` ``[C, B]`` sums to one over each client's real samples and is 0 on padding; None when every place holds a sample.
    ``ids`` and ``rounds`` ``[C]``, ``step`` and the run's ``seed`` say whose step it is, and which (dropout masks follow them).
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None
    ids: Tensor
    rounds: Tensor
    step: int
    seed: int


@dataclass(frozen=True)
class Samples:
    """``x`` ``[N, ...]``, ``y`` ``[N, ...]``; int64 ``offsets`` ``[clients + 1]`` and ``index`` ``[N]`` (or None) on the CPU.

    ``domains`` int64 ``[clients]`` is the domain of each client's data, where these differ.
    """

    x: Tensor
    y: Tensor
    offsets: Tensor
    index: Tensor | None = None
    domains: Tensor | None = None

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.offsets) - 1

    def counts(self, ids: Tensor | None = None) -> Tensor:
        """Number of samples of the given clients (default: all), int64."""
        offsets = self.offsets.numpy()  # on a few numbers NumPy's calls cost a third of torch's
        if ids is None:
            return torch.from_numpy(np.diff(offsets))
        clients = ids.numpy()
        return torch.from_numpy(offsets[clients + 1] - offsets[clients])

    def take(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at ``places`` in client order, any shape: ``x`` ``[*places, ...]`` and ``y``."""
        rows = (places if self.index is None else self.index[places]).to(self.x.device).flatten()
        x, y = self.x.index_select(0, rows), self.y.index_select(0, rows)  # a third of the time of indexing with a table
        return x.view(*places.shape, *x.shape[1:]), y.view(*places.shape, *y.shape[1:])

    def of(self, client: int) -> tuple[Tensor, Tensor]:
        """All samples of one client."""
        return self.take(torch.arange(int(self.offsets[client]), int(self.offsets[client + 1])))

    def some(self, clients: Tensor) -> Samples:
        """Those of the given ``clients``, bool ``[clients]``, alone; the others are there without any."""
        counts = self.counts()
        places = clients.repeat_interleave(counts).nonzero().squeeze(1)
        x, y = self.take(places)
        ends = torch.where(clients, counts, 0).cumsum(0)
        return Samples(x, y, torch.cat([ends.new_zeros(1), ends]), None, self.domains)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Samples:
        """Copy to a device; floating ``x`` and ``y`` also to ``dtype``."""
        x, y = (t.to(device, dtype if dtype and t.is_floating_point() else t.dtype) for t in (self.x, self.y))
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Plan:
    """How long and in what pieces clients work: ``steps`` local steps, or ``epochs`` passes when ``steps`` is None."""

    batch: int = 32
    epochs: int = 1
    steps: int | None = None
    shuffle: bool = True

    def lengths(self, counts: Tensor) -> Tensor:
        """Local steps per client, int64."""
        if self.steps is not None:
            return torch.full_like(counts, self.steps)
        return torch.from_numpy(-(-counts.numpy() // self.batch) * self.epochs)

    def seen(self, counts: Tensor, lengths: Tensor) -> Tensor:
        """Samples that each client goes through in ``lengths`` local steps, int64; the last batch of a pass may be short."""
        passes = (-(-counts // self.batch)).clamp(min=1)
        return counts * (lengths // passes) + lengths % passes * counts.clamp(max=self.batch)

    def batches(
        self, samples: Samples, ids: Tensor, streams: Streams, rounds: Tensor, steps: Tensor
    ) -> Iterator[tuple[int, Batch]]:
        """Yield ``(active, batch)`` per local step of clients ``ids``, sorted by falling numbers of ``steps``, in their ``rounds``.

        The first ``active`` clients still work; a client that has gone through its data starts over in a new order.
        Client ``i`` sees the same batches whoever else is in ``ids``.
        """
        # Index arithmetic stays in NumPy: its calls cost less on a few numbers, and nothing waits for a device.
        first, counts = samples.offsets.numpy()[ids.numpy()], samples.counts(ids).numpy()
        passes = -(-counts // self.batch)
        lengths = steps.numpy()
        if not len(lengths):
            return
        low, high = int(counts.min()), int(counts.max())
        place, per_pass = np.arange(self.batch), -(-high // self.batch)
        order = None
        for k in range(int(lengths[0])):
            active = len(lengths) if lengths[-1] > k else int((lengths > k).sum())
            if self.shuffle:
                order = self._order(order, counts, passes, ids, streams, rounds, k)
            weight = None
            if low == high:
                begin = (k % per_pass) * self.batch
                where = np.broadcast_to(place[: min(self.batch, high - begin)] + begin, (active, min(self.batch, high - begin)))
            else:
                start = (k % passes[:active]) * self.batch
                left = np.minimum(counts[:active] - start, self.batch)
                width = int(left.max())
                if width == int(left.min()):
                    where = start[:, None] + place[:width]
                else:
                    real = place[:width] < left[:, None]
                    where = start[:, None] + place[:width] * real  # padding repeats the batch's first sample
                    dtype = samples.x.dtype if samples.x.is_floating_point() else torch.float64
                    weight = torch.from_numpy(real / left[:, None]).to(samples.x.device, dtype)
            if order is not None:
                where = np.take_along_axis(order[:active], where, 1)
            x, y = samples.take(torch.from_numpy(where + first[:active, None]))
            yield active, Batch(x, y, weight, ids[:active], rounds[:active], k, streams.seed)

    def _order(
        self, order: Order | None, counts: Order, passes: Order, ids: Tensor, streams: Streams, rounds: Tensor, k: int
    ) -> Order:
        """``[C, max count]``: the order of each client's samples, drawn anew for the clients that begin a pass at step ``k``."""
        due = k % passes == 0
        if order is not None and not due.any():
            return order
        n = int(counts.max())
        keys = streams.words("batches", ids, rounds, n, extra=torch.from_numpy(k // passes)).cpu().numpy()
        keys[np.arange(n) >= counts[:, None]] = MASK + 1  # padding sorts last
        fresh = keys.argsort(axis=1, kind="stable")
        return fresh if order is None else np.where(due[:, None], fresh, order)
