"""The one wire format: a frame around what a codec writes.

    "hz" | version u8 | type of the entries u8 | CRC-32 u32 of all the rest | number of entries u64 | body

Little-endian; 16 bytes and the body. A reader takes nothing on trust: what a length promises has to be there, and no vector is made
longer than was asked for.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hanse.core.errors import CodecError

FRAME = struct.Struct("<2sBBIQ")
VERSION = 1
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMIT = 1 << 28
"""Most entries of a vector whose length the reader was not told, a gigabyte of float32."""


Buffer = bytes | memoryview


def raw(x: Tensor) -> memoryview:
    """The numbers of a tensor as they are, without a copy."""
    numbers: Any = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(numbers)


def varint(n: int) -> bytes:
    """A length in as few bytes as it needs, seven bits each (LEB128)."""
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def varint_size(n: Tensor) -> Tensor:
    """Bytes of ``varint``, int64."""
    size = torch.ones_like(n)
    for bits in range(7, 63, 7):
        size += n >= 1 << bits
    return size


def frame(x: Tensor, body: Sequence[Buffer]) -> bytes:
    """``body``, pieces that together stand for the vector ``x``, in a frame."""
    if x.dtype not in DTYPES:
        raise CodecError(f"a vector of {x.dtype} is not allowed: {', '.join(map(str, DTYPES))}")
    head = FRAME.pack(b"hz", VERSION, DTYPES.index(x.dtype), 0, x.numel())
    check = zlib.crc32(head[8:], zlib.crc32(head[:4]))
    for piece in body:
        check = zlib.crc32(piece, check)
    return b"".join((head[:4], check.to_bytes(4, "little"), head[8:], *body))


def unframe(data: bytes, size: int | None = None) -> tuple[int, torch.dtype, Reader]:
    """Number and type of the entries, and the body; raises ``CodecError`` on anything else, or on another number than ``size``."""
    if len(data) < FRAME.size:
        raise CodecError(f"not a frame: {len(data)} bytes, at least {FRAME.size} are needed")
    magic, version, kind, check, n = FRAME.unpack_from(data)
    if magic != b"hz" or version != VERSION or kind >= len(DTYPES):
        raise CodecError(f"not a frame of version {VERSION}: it begins with {data[:4]!r}")
    if check != zlib.crc32(memoryview(data)[8:], zlib.crc32(data[:4])):
        raise CodecError("the frame's checksum does not fit: it was damaged on its way")
    if n != size if size is not None else n > LIMIT:
        raise CodecError(f"the frame promises {n} entries, {size if size is not None else f'at most {LIMIT}'} are allowed")
    return n, DTYPES[kind], Reader(memoryview(data)[FRAME.size :])


class Reader:
    """What is left of a body; each method takes something from its front and raises ``CodecError`` if it is not there."""

    def __init__(self, data: memoryview | bytes) -> None:
        self.data, self.at = memoryview(data), 0

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return len(self.data) - self.at

    def take(self, size: int) -> memoryview:
        """So many bytes."""
        if size > self.left:
            raise CodecError(f"the body ends early: {size} bytes are promised, {self.left} are there")
        self.at += size
        return self.data[self.at - size : self.at]

    def varint(self, most: int) -> int:
        """A length of at most ``most``."""
        n = shift = 0
        while shift < 63:
            byte = self.take(1)[0]
            n |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                if n > most or (byte == 0 and shift > 7):
                    break
                return n
        raise CodecError(f"a length of more than {most}, or not written in the shortest way")

    def array(self, dtype: torch.dtype, count: int) -> Tensor:
        """So many numbers, in memory of their own."""
        data = self.take(count * dtype.itemsize)
        return torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.empty(0, dtype=dtype)

    def end(self) -> None:
        """Nothing may be left."""
        if self.left:
            raise CodecError(f"{self.left} bytes too many")
