"""The samples of all clients side by side, and the order in which clients go through them.

No object per client: client ``i`` owns the rows ``index[offsets[i] : offsets[i + 1]]`` of ``x`` and ``y`` (or those rows
themselves when the data already lie in client order), so a million clients are one array of offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hanse.core.streams import MASK, Streams


class Batch(NamedTuple):
    """One local step of ``C`` clients: ``x`` ``[C, B, ...]``, ``y`` ``[C, B, ...]``.

    ``weight`` ``[C, B]`` sums to one over each client's real samples and is 0 on padding; None when every place holds a sample.
    ``key`` ``[C]`` numbers (client, round, step) for dropout masks.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None
    key: Tensor

    def narrow(self, i: int, n: int) -> Batch:
        """Clients ``i`` to ``i + n``."""
        weight = None if self.weight is None else self.weight[i : i + n]
        return Batch(self.x[i : i + n], self.y[i : i + n], weight, self.key[i : i + n])


@dataclass(frozen=True)
class Samples:
    """``x`` ``[N, ...]``, ``y`` ``[N, ...]``, ``offsets`` int64 ``[clients + 1]``, ``index`` int64 ``[N]`` or None."""

    x: Tensor
    y: Tensor
    offsets: Tensor
    index: Tensor | None = None

    @property
    def clients(self) -> int:
        return len(self.offsets) - 1

    def counts(self, ids: Tensor | None = None) -> Tensor:
        """Number of samples of the given clients (default: all), int64."""
        if ids is None:
            return self.offsets[1:] - self.offsets[:-1]
        return self.offsets[ids + 1] - self.offsets[ids]

    def rows(self, places: Tensor) -> Tensor:
        """Places in client order to rows of ``x`` and ``y``."""
        return places if self.index is None else self.index[places]

    def of(self, client: int) -> tuple[Tensor, Tensor]:
        """All samples of one client: ``x`` and ``y``."""
        rows = self.rows(torch.arange(int(self.offsets[client]), int(self.offsets[client + 1]), device=self.x.device))
        return self.x[rows], self.y[rows]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Samples:
        """Copy to a device; floating ``x`` and ``y`` also to ``dtype``."""
        cast = [t.to(device, dtype if dtype and t.is_floating_point() else t.dtype) for t in (self.x, self.y)]
        return Samples(*cast, self.offsets.to(device), None if self.index is None else self.index.to(device))


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
        return self.epochs * (-(-counts // self.batch))

    def batches(self, samples: Samples, ids: Tensor, streams: Streams, round: int) -> Iterator[tuple[int, Batch]]:
        """Yield ``(active, batch)`` per local step; ``ids`` must be sorted by falling number of steps.

        The first ``active`` clients still work; a client that has gone through its data starts over in a new order.
        Client ``i`` sees the same batches whoever else is in ``ids``.
        """
        counts, first = samples.counts(ids), samples.offsets[ids]
        passes, lengths = -(-counts // self.batch), self.lengths(counts)
        span = lengths.tolist()
        if not span:
            return
        low, high = int(counts.min()), int(counts.max())
        even = low == high
        per_pass, place = -(-high // self.batch), torch.arange(self.batch, device=ids.device)
        order = None
        for k in range(span[0]):
            active = len(span) if span[-1] > k else sum(length > k for length in span)
            if self.shuffle:
                order = self._shuffled(order, counts, passes, ids, streams, round, k)
            key = ids[:active] * 0x10001 + (round << 20) + k
            weight = None
            if even:
                j = k % per_pass
                pos = place[: min(self.batch, high - j * self.batch)] + j * self.batch
                where = pos.expand(active, -1)
            else:
                start = (k % passes[:active]) * self.batch
                left = (counts[:active] - start).clamp(max=self.batch)
                where = start[:, None] + place[: int(left.max())]
                real = where < counts[:active, None]
                if not bool(real.all()):
                    weight = real.to(torch.get_default_dtype() if not samples.x.is_floating_point() else samples.x.dtype)
                    weight /= left[:, None]
                    where = where.minimum(counts[:active, None] - 1)
            if order is not None:
                where = order[:active].gather(1, where)
            rows = samples.rows(where + first[:active, None])
            yield active, Batch(samples.x[rows], samples.y[rows], weight, key)

    def _shuffled(
        self, order: Tensor | None, counts: Tensor, passes: Tensor, ids: Tensor, streams: Streams, round: int, k: int
    ) -> Tensor:
        """A fresh order for the clients that begin a pass at step ``k``."""
        due = (k % passes) == 0
        if order is not None and not bool(due.any()):
            return order
        n = int(counts.max())
        keys = streams.words("batches", ids, round, n, extra=k // passes)
        keys[torch.arange(n, device=ids.device) >= counts[:, None]] = MASK + 1  # padding sorts last
        fresh = torch.argsort(keys, dim=1, stable=True)
        return fresh if order is None else torch.where(due[:, None], fresh, order)
