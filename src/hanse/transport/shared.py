"""Payloads in memory that both ends share: the sender writes into slots of a pool that the receiver owns, and only headers and
acknowledgements go over the connection."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hanse.core.errors import CodecError, TransportError
from hanse.transport.blocks import Block, Blocks, attach
from hanse.transport.frames import HEADER, SHARED, Frame
from hanse.transport.tcp import Channel

MARK = 16


def copy(target: memoryview, source: memoryview) -> None:
    """Like ``target[:] = source``, without keeping other threads from running."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


class Slots:
    """A receiver's pool of ``window`` slots of ``chunk`` bytes, made once for a connection and used for all its streams.

    Its first bytes are a mark that the sender is told, so that it knows it has found this memory and not a namesake's.
    """

    _lock = threading.Lock()

    def __init__(self, blocks: Blocks, window: int, chunk: int) -> None:
        self.window, self.chunk = window, chunk
        self._blocks = blocks
        with self._lock:
            self.block: Block = blocks.take(MARK + window * chunk)
        self.mark = secrets.token_bytes(MARK)
        self.block.memory[:MARK] = torch.frombuffer(bytearray(self.mark), dtype=torch.uint8)
        self._view = self.block.memory.numpy().data[MARK:]

    def fits(self, window: int, chunk: int) -> bool:
        """Whether such a stream can use it."""
        return self.window >= window and self.chunk >= chunk

    def offer(self) -> dict[str, object]:
        """What the sender has to know."""
        return {"block": self.block.name, "mark": self.mark.hex(), "chunk": self.chunk}

    def slot(self, frame: Frame) -> memoryview:
        """Where the payload of a frame lies. Raises ``CodecError`` if there is no such slot."""
        if frame.slot >= self.window or frame.length > self.chunk:
            raise CodecError(f"{frame.length} bytes in slot {frame.slot}; there are {self.window} slots of {self.chunk} bytes")
        start = frame.slot * self.chunk
        return self._view[start : start + frame.length]

    def close(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._blocks.give_back(self.block)


class Writer:
    """The sender's side of a pool: one copy a byte, into the slot that is free because its last chunk has been acknowledged."""

    def __init__(self, block: str, mark: str, chunk: int) -> None:
        self.block, self.chunk = block, chunk
        self._memory: Tensor = attach(block)
        if self._memory[:MARK].numpy().tobytes().hex() != mark:
            raise TransportError(f"{block}: not the memory of this peer")
        self._view = self._memory.numpy().data[MARK:]

    def send(self, channel: Channel, frame: Frame, parts: Sequence[memoryview]) -> int:
        """Write the payload and send its header; the bytes that took on the connection."""
        at = frame.slot * self.chunk
        if at + frame.length > len(self._view):
            raise TransportError(f"slot {frame.slot} of {self.chunk} bytes lies outside of the shared memory")
        for part in parts:
            copy(self._view[at : at + len(part)], part)
            at += len(part)
        channel.send(replace(frame, flags=SHARED).pack())
        return HEADER.size

    def close(self) -> None:
        """The mapping goes with the last use of it."""
