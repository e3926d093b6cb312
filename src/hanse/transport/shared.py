"""Payloads in memory that both ends share: the sender writes into slots of a pool that the receiver owns, and only headers and
acknowledgements go over the connection."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hanse.core.errors import CodecError, TransportError
from hanse.transport.blocks import Blocks, attach
from hanse.transport.frames import HEADER, SHARED, Frame, Said
from hanse.transport.tcp import Channel

MARK = 16


def gather(target: memoryview, parts: Sequence[memoryview]) -> None:
    """Copy ``parts`` one after the other to the beginning of ``target``."""
    at = 0
    for part in parts:
        copy(target[at : at + len(part)], part)
        at += len(part)


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
            self.block = blocks.take(MARK + window * chunk)
        mark = secrets.token_bytes(MARK)
        self.offer: dict[str, object] = {"block": self.block.name, "mark": mark.hex(), "chunk": chunk}
        """What the sender has to know."""
        self._view = self.block.memory.numpy().data
        self._view[:MARK] = mark

    def slot(self, frame: Frame) -> memoryview:
        """Where the payload of a frame lies. Raises ``CodecError`` if there is no such slot."""
        if frame.slot >= self.window or frame.length > self.chunk:
            raise CodecError(f"{frame.length} bytes in slot {frame.slot}; there are {self.window} slots of {self.chunk} bytes")
        start = MARK + frame.slot * self.chunk
        return self._view[start : start + frame.length]

    def close(self) -> None:
        """Give the memory back."""
        with self._lock:
            self._blocks.give_back(self.block)


class Writer:
    """The sender's side of a pool: one copy a byte, into the slot that is free because its last chunk has been acknowledged."""

    def __init__(self, offer: Said) -> None:
        block, self._chunk = offer.get("block", str), offer.get("chunk", int)
        self._view = attach(block).numpy().data
        if self._view[:MARK].hex() != offer.get("mark", str):
            raise TransportError(f"{block}: not the memory of this peer")

    def send(self, channel: Channel, frame: Frame, parts: Sequence[memoryview]) -> int:
        """Write the payload and send its header; the bytes that took on the connection."""
        if not 0 < frame.length <= self._chunk or MARK + (frame.slot + 1) * self._chunk > len(self._view):
            raise TransportError(f"{frame.length} bytes in slot {frame.slot} of {self._chunk} lie outside of the shared memory")
        at = MARK + frame.slot * self._chunk
        gather(self._view[at:], parts)
        channel.send(replace(frame, flags=SHARED).pack())
        return HEADER.size
