"""What travels: chunks of a stream with a header of 40 bytes, acknowledgements of 16, and messages in JSON that control both.

    chunk    magic u32, version u8, flags u8, slot u16, job u64, round u32, stream u32, index u32, count u32, length u32, crc32 u32
    ack      stream u32, base u32 (all chunks below have arrived), bitmap u64 (which of base .. base + 63 have)

The lowest bit of the bitmap stands for the first chunk that has not arrived; it is set in the answer to a damaged one.

Little-endian. A control message is a chunk with the flag ``CONTROL`` whose payload is JSON. No stream has the magic for a number,
so the first four bytes tell an acknowledgement from a chunk. The checksum covers the payload and the fields from ``job`` to
``length``: a chunk that is put in another's place is damaged. It leaves out flags and slot, which say how the payload travels and
are not known when it is prepared. Everything parsed here comes from others: ``CodecError`` on whatever is not exactly this.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from hanse.core.errors import CodecError, TransportError

T = TypeVar("T")

MAGIC = int.from_bytes(b"\xf1hns", "little")
VERSION = 1
HEADER = struct.Struct("<IBBHQIIIIII")
ACK = struct.Struct("<IIQ")
_COVERED = struct.Struct("<QIIIII")

INLINE, CONTROL, SHARED, UCX = 0, 1, 2, 3
"""Flags: the payload follows; it follows and is JSON; it lies in a slot of shared memory; it comes by UCX under a tag."""

LONGEST_CHUNK = 1 << 30
MOST_CHUNKS = 1 << 20
WIDEST = 64
"""Chunks in flight at most: those that the bitmap of one acknowledgement can name."""
LONGEST_CONTROL = 1 << 20
LONGEST_GREETING = 1 << 12
"""Bytes of a control message from a peer that has not shown yet who it is."""


class Name(NamedTuple):
    """Which stream: the job (u64), the round (u32), and its number in the round (u32)."""

    job: int
    round: int
    number: int

    def __str__(self) -> str:
        return f"stream {self.number} of round {self.round}"


@dataclass(frozen=True, slots=True)
class Frame:
    """The header of a chunk."""

    flags: int
    slot: int
    name: Name
    index: int
    count: int
    length: int
    crc: int

    def pack(self) -> bytes:
        """40 bytes."""
        return HEADER.pack(MAGIC, VERSION, self.flags, self.slot, *self.name, self.index, self.count, self.length, self.crc)

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Frame:
        """Raises ``CodecError`` unless ``data`` is a header whose fields can be true together."""
        if len(data) != HEADER.size:
            raise CodecError(f"a header of {len(data)} bytes; {HEADER.size} are one")
        magic, version, flags, slot, job, round, number, index, count, length, crc = HEADER.unpack(data)
        if magic != MAGIC:
            raise CodecError(f"not a chunk: it begins with {bytes(data[:4])!r}")
        if version != VERSION:
            raise CodecError(f"version {version} of the protocol; {VERSION} is spoken here")
        if flags not in (INLINE, CONTROL, SHARED, UCX):
            raise CodecError(f"flags {flags} of a chunk are unknown")
        if number == MAGIC:
            raise CodecError(f"stream {number} is no stream")
        if flags == CONTROL:
            if index or count or length > LONGEST_CONTROL:
                raise CodecError(f"a control message of {length} bytes; at most {LONGEST_CONTROL} are read")
        elif not (index < count <= MOST_CHUNKS and 0 < length <= LONGEST_CHUNK):
            raise CodecError(f"chunk {index} of {count} with {length} bytes")
        return cls(flags, slot, Name(job, round, number), index, count, length, crc)


class Ack(NamedTuple):
    """What a receiver has of a stream."""

    number: int
    base: int
    bitmap: int

    @property
    def damaged(self) -> bool:
        """Whether it answers a chunk that arrived damaged."""
        return bool(self.bitmap & 1)

    def pack(self) -> bytes:
        """16 bytes."""
        return ACK.pack(*self)

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Ack:
        """Raises ``CodecError`` unless ``data`` is 16 bytes that do not begin a chunk."""
        if len(data) != ACK.size:
            raise CodecError(f"an acknowledgement of {len(data)} bytes; {ACK.size} are one")
        ack = cls(*ACK.unpack(data))
        if ack.number == MAGIC:
            raise CodecError(f"{bytes(data)!r} is no acknowledgement")
        return ack


def checksum(name: Name, index: int, count: int, parts: Iterable[memoryview]) -> int:
    """The CRC-32 of a chunk whose payload is ``parts`` one after the other."""
    parts = list(parts)
    crc = zlib.crc32(_COVERED.pack(*name, index, count, sum(len(p) for p in parts)))
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def control(name: Name, say: str, **fields: Any) -> bytes:
    """A control message, header and all. Raises ``CodecError`` if it is too long to be read."""
    text = json.dumps({"say": say, **fields}).encode()
    if len(text) > LONGEST_CONTROL:
        raise CodecError(f"a control message of {len(text)} bytes; at most {LONGEST_CONTROL} are read")
    return Frame(CONTROL, 0, name, 0, 0, len(text), checksum(name, 0, 0, [memoryview(text)])).pack() + text


class Said(NamedTuple):
    """A control message: whose, what, and its fields."""

    name: Name
    say: str
    fields: dict[str, Any]

    def refusal(self) -> TransportError:
        """The error for a message that says "refused", with the reason that the peer gives, in a line."""
        return TransportError(f"refused: {' '.join(self.get('reason', str).split())[:200]}")

    def get(self, field: str, kind: type[T]) -> T:
        """A field of exactly this type; raises ``CodecError`` if there is none."""
        value = self.fields.get(field)
        if type(value) is not kind:
            raise CodecError(f"{self.say}: {field} is {value!r:.40}; it must be of type {kind.__name__}")
        return value


def said(frame: Frame, text: bytes | bytearray | memoryview) -> Said:
    """Read a control message. Raises ``CodecError`` where it is damaged or not one."""
    if checksum(frame.name, 0, 0, [memoryview(text)]) != frame.crc:
        raise CodecError("a damaged control message")
    try:
        fields = json.loads(bytes(text))
        say = fields.pop("say")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CodecError(f"not a control message: {error}") from None
    if type(say) is not str:
        raise CodecError(f"not a control message: it says {say!r:.40}")
    return Said(frame.name, say, fields)
