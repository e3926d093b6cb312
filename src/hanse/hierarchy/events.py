"""What a service and its aggregators tell each other: 24 bytes an event, and where in shared memory it is.

An event is a key of 16 bytes and a weight of 8. The key names a block on one of a node's two shelves, that of updates and that of
results; the numbers themselves never pass through the socket. Neither this file nor what it imports loads torch.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hanse.hierarchy.partial import Vector

_FORMAT = struct.Struct("<IBBHQd")
SIZE = _FORMAT.size


class Kind(IntEnum):
    """What an event asks for or tells."""

    START = 0
    """Begin a mean in this block."""
    INPUT = 1
    """Add this block with this weight."""
    CLOSE = 2
    """No more inputs will come."""
    SEND = 3
    """Write this block into the data socket."""
    FORGET = 4
    """This block is no longer there."""
    DONE = 5
    """The mean is where it was to be; the weight is the sum of all, the number of the key the nanoseconds spent on it."""


class Event(NamedTuple):
    """A kind, a key (block, shelf and number) and a weight."""

    kind: Kind
    shelf: int = 0
    block: int = 0
    number: int = 0
    weight: float = 0.0

    def pack(self) -> bytes:
        """The 24 bytes."""
        return _FORMAT.pack(self.block, self.shelf, self.kind, 0, self.number, self.weight)


def unpack(data: bytes) -> Iterator[Event]:
    """The events in so many times 24 bytes."""
    for block, shelf, kind, _, number, weight in _FORMAT.iter_unpack(data):
        yield Event(Kind(kind), shelf, block, number, weight)


class Shelf:
    """The blocks of a folder as vectors ``[size]`` of one type, each mapped once, with its pages, and kept."""

    def __init__(self, folder: str, dtype: str, size: int) -> None:
        self.folder, self.dtype, self.size = Path(folder), np.dtype(dtype), size
        self._views: dict[int, Vector] = {}

    def view(self, block: int) -> Vector:
        """The numbers in a block, where they are."""
        found = self._views.get(block)
        if found is None:
            # Not attached as transport.blocks would, which loads torch and finds the pages one by one.
            descriptor = os.open(self.folder / str(block), os.O_RDWR)
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            try:
                memory = mmap.mmap(descriptor, self.dtype.itemsize * self.size, flags)
            finally:
                os.close(descriptor)
            found = self._views[block] = np.frombuffer(memory, self.dtype, self.size)
        return found

    def forget(self, block: int) -> None:
        """Let go of a block that is no longer there."""
        self._views.pop(block, None)
