"""A node's store: vectors in shared memory that are written once, read by anybody, and gone when nobody needs them any more.

Two shelves, because updates and results may be of different types and must not keep each other out: however many updates wait,
there is room for what they are added up to. A shelf lends its blocks again, so memory is what was needed at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from hanse.core.errors import TransportError
from hanse.hierarchy.events import Event, Kind
from hanse.transport.blocks import Block, Blocks

UPDATES, RESULTS = 0, 1
"""Numbers of the shelves."""


@dataclass(eq=False)
class Stored:
    """A vector ``values`` ``[P]`` under a key (shelf, block and number), and how many still need it."""

    store: Store
    shelf: int
    block: Block
    number: int
    values: Tensor
    weight: float = 0.0
    references: int = 1

    @property
    def name(self) -> str:
        """The name under which other processes of this machine attach to its memory."""
        return self.block.name

    @property
    def place(self) -> int:
        """The number of its block on its shelf."""
        return int(Path(self.block.name).name)

    def event(self, kind: Kind) -> Event:
        """What an aggregator is told of it."""
        return Event(kind, self.shelf, self.place, self.number, self.weight)

    def release(self) -> None:
        """One less needs it; after the last its memory is lent again."""
        self.references -= 1
        if not self.references:
            self.store.take_back(self)


class Store:
    """On node ``node``, at most ``updates`` and ``results`` vectors of ``size`` numbers at once, of a type each."""

    def __init__(self, node: int, size: int, dtypes: tuple[torch.dtype, torch.dtype], updates: int, results: int) -> None:
        self.node, self.size, self.dtypes, self.most = node, size, dtypes, (updates, results)
        self.shelves = Blocks(), Blocks()
        self.stored: dict[int, Stored] = {}
        """What somebody still needs, by number."""
        self.used, self.peak = [0, 0], [0, 0]
        """Vectors on each shelf now, and at most."""
        self._numbers = count()

    @property
    def peak_bytes(self) -> int:
        """Bytes of shared memory taken at most."""
        return sum(n * self.size * dtype.itemsize for n, dtype in zip(self.peak, self.dtypes, strict=True))

    def full(self, shelf: int) -> bool:
        """Whether nothing more fits on a shelf."""
        return self.used[shelf] >= self.most[shelf]

    def take(self, shelf: int) -> Stored:
        """A vector to be filled, needed by the caller. Raises ``TransportError`` if its shelf or the machine's memory is full."""
        dtype = self.dtypes[shelf]
        if self.full(shelf):
            size = self.most[shelf] * self.size * dtype.itemsize
            raise TransportError(f"budget: {('updates', 'results')[shelf]} fill {size:,} bytes; a larger budget is needed")
        block = self.shelves[shelf].take(self.size * dtype.itemsize)
        values = block.memory[: self.size * dtype.itemsize].view(dtype)
        found = Stored(self, shelf, block, next(self._numbers), values)
        self.stored[found.number] = found
        self.used[shelf] += 1
        self.peak[shelf] = max(self.used[shelf], self.peak[shelf])
        return found

    def take_back(self, old: Stored) -> None:
        """Lend the memory of what nobody needs again."""
        self._forget(old)
        self.shelves[old.shelf].give_back(old.block)

    def give_away(self, old: Stored) -> Tensor:
        """The values, whose memory is from now on the caller's alone: it has no name and goes when they do."""
        self._forget(old)
        Path(old.name).unlink()
        return old.values

    def close(self) -> None:
        """Remove everything; mappings that others hold stay valid until they drop them."""
        for blocks in self.shelves:
            blocks.close()

    def _forget(self, old: Stored) -> None:
        old.references = 0
        del self.stored[old.number]
        self.used[old.shelf] -= 1
