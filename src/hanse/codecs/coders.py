"""Ways to write places and symbols without loss.

Places are rising, so they can be a bit an entry, addresses, or gaps; symbols are packed into as few bits as their number needs, or
into Huffman's. ``grouped`` writes the places of each symbol by themselves, so that symbols cost nothing but their counts (FedZip).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanse.codecs.chain import Coder, Load
from hanse.codecs.wire import Buffer, Reader, raw, varint, varint_size
from hanse.core.errors import CodecError

Ints = NDArray[np.int64]
Bits = NDArray[np.uint8]


def width(most: int) -> int:
    """Bits of the numbers from 0 to ``most``."""
    return most.bit_length()


def fixed(values: Ints, bits: int) -> Bits:
    """Numbers in ``bits`` bits each, lowest first."""
    return ((values[:, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(-1)


def numbers(found: Bits, bits: int) -> Ints:
    """What ``fixed`` made."""
    values: Ints = (found.reshape(-1, bits).astype(np.int64) << np.arange(bits)).sum(1)
    return values


def to_bytes(*bits: Bits) -> bytes:
    """Bits one after another, padded to whole bytes with zeros."""
    return np.packbits(np.concatenate(bits), bitorder="little").tobytes()


def from_bytes(data: memoryview | bytes, count: int) -> Bits:
    """The first ``count`` bits; raises ``CodecError`` unless the padding is zeros."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if bits[count:].any():
        raise CodecError("the bits after the last are not zero")
    return bits[:count]


def take_bits(reader: Reader, count: int) -> Bits:
    """``count`` bits in whole bytes."""
    return from_bytes(reader.take(-(-count // 8)), count)


def pack(symbols: Tensor, levels: int) -> Buffer:
    """Symbols in as few bits as ``levels`` need."""
    bits = width(levels - 1)
    if bits == 8:
        return raw(symbols)
    if bits not in (1, 2, 4):
        return to_bytes(fixed(symbols.numpy().astype(np.int64), bits))
    each = 8 // bits  # whole symbols to a byte
    columns = np.pad(symbols.numpy(), (0, -len(symbols) % each)).reshape(-1, each)
    out = columns[:, 0].copy()
    for i in range(1, each):
        out |= columns[:, i] << (bits * i)
    return out.tobytes()


def unpack(reader: Reader, count: int, levels: int) -> Tensor:
    """``count`` symbols; raises ``CodecError`` if one is not below ``levels``."""
    bits = width(levels - 1)
    if bits == 8:
        found = reader.array(torch.uint8, count)
    elif bits in (1, 2, 4):
        data = np.frombuffer(reader.take(-(-count * bits // 8)), np.uint8)
        symbols = _unpacked(bits)[data].view(np.uint8)
        if symbols[count:].any():
            raise CodecError("the bits after the last are not zero")
        found = torch.from_numpy(symbols[:count])
    elif bits:
        found = torch.from_numpy(numbers(take_bits(reader, count * bits), bits).astype(np.uint8))
    else:
        found = torch.zeros(count, dtype=torch.uint8)
    if count and levels < 1 << bits and int(found.max()) >= levels:
        raise CodecError(f"a symbol of {int(found.max())}, at most {levels - 1} is allowed")
    return found


@lru_cache
def _unpacked(bits: int) -> NDArray[Any]:
    """The symbols that each byte holds, side by side as one number."""
    symbols = (np.arange(256, dtype=np.uint8)[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & ((1 << bits) - 1)
    return symbols.view(f"u{8 // bits}").ravel()


def packed_size(counts: Tensor, levels: int) -> Tensor:
    """Bytes of ``pack``, int64 ``[C]``."""
    return -(-counts * width(levels - 1) // 8) if levels else torch.zeros_like(counts)


def _rising(places: Ints, size: int) -> Tensor:
    if len(places) and (places[0] < 0 or places[-1] >= size or (np.diff(places) <= 0).any()):
        raise CodecError(f"places are not in order and below {size}")
    return torch.from_numpy(places)


class packed(Coder):
    """Places as 32-bit numbers, symbols in as few bits as they need. What a chain without a coder does."""

    def write(self, size: int, places: Tensor | None, symbols: Tensor | None, levels: int) -> list[Buffer]:
        written: list[Buffer] = [] if places is None else [raw(places.int())]
        return written if symbols is None else [*written, pack(symbols, levels)]

    def read(self, reader: Reader, size: int, count: int, placed: bool, levels: int) -> tuple[Tensor | None, Tensor | None]:
        places = _rising(np.frombuffer(reader.take(4 * count), np.uint32).astype(np.int64), size) if placed else None
        return places, unpack(reader, count, levels) if levels else None

    def sizes(self, load: Load) -> Tensor:
        counts = load.lengths.cpu()
        return (0 if load.places is None else 4 * counts) + packed_size(counts, load.levels)


class Places(Coder):
    """Base of the ways to write places; a load without places is packed."""

    abstract: ClassVar[bool] = True
    grouped: bool = False
    """Whether places are written symbol by symbol, which then need not be."""

    def bits(self, places: list[Ints], size: int) -> bytes:
        """The places of each group."""
        raise TypeError(f"{type(self).__name__} does not define bits")

    def places(self, reader: Reader, counts: list[int], size: int) -> list[Ints]:
        """The so many places of each group; they need not be in order or below ``size``."""
        raise TypeError(f"{type(self).__name__} does not define places")

    def lengths(self, gaps: Tensor, groups: Tensor, counts: Tensor, size: int) -> Tensor:
        """Bytes of ``bits``, int64 ``[C]``.

        ``gaps`` int64 ``[C, m]`` are the entries between a place and the one before it in its group, ``groups`` int64 ``[C, m]`` is
        the group of each, ``groups.max() + 1`` beyond a client's places, and ``counts`` int64 ``[C, G]`` are places by group.
        """
        raise TypeError(f"{type(self).__name__} does not define lengths")

    def write(self, size: int, places: Tensor | None, symbols: Tensor | None, levels: int) -> list[Buffer]:
        if places is None:
            return packed().write(size, places, symbols, levels)
        where = places.numpy()
        if symbols is None or not self.grouped:
            return [self.bits([where], size), *([] if symbols is None else [pack(symbols, levels)])]
        groups = [where[symbols.numpy() == s] for s in range(levels)]
        return [*(varint(len(g)) for g in groups[:-1]), self.bits(groups, size)]

    def read(self, reader: Reader, size: int, count: int, placed: bool, levels: int) -> tuple[Tensor | None, Tensor | None]:
        if not placed:
            return packed().read(reader, size, count, placed, levels)
        if not levels or not self.grouped:
            places = _rising(self.places(reader, [count], size)[0], size)
            return places, unpack(reader, count, levels) if levels else None
        counts, left = [], count
        for _ in range(levels - 1):
            counts.append(reader.varint(left))
            left -= counts[-1]
        groups = self.places(reader, [*counts, left], size)
        for group in groups:
            _rising(group, size)
        where = np.concatenate(groups)
        order = np.argsort(where)
        symbols = np.repeat(np.arange(levels, dtype=np.uint8), [*counts, left])[order]
        return _rising(where[order], size), torch.from_numpy(symbols)

    def sizes(self, load: Load) -> Tensor:
        if load.places is None:
            return packed().sizes(load)
        count, places, there = load.lengths.cpu(), load.places.cpu(), load.there
        grouped = self.grouped and load.symbols is not None
        groups = load.symbols.cpu().long() if grouped and load.symbols is not None else torch.zeros_like(places)
        total = load.levels if grouped else 1
        if there is not None:
            groups = torch.where(there.cpu(), groups, total)
        order = groups.argsort(dim=1, stable=True)
        groups, places = groups.gather(1, order), places.gather(1, order)
        before = torch.cat([torch.full_like(places[:, :1], -1), places[:, :-1]], 1)
        first = torch.cat([torch.ones_like(groups[:, :1]), groups.diff(dim=1)], 1) != 0
        gaps = torch.where(groups < total, places - torch.where(first, -1, before) - 1, 0)
        counts = torch.zeros(len(places), total + 1, dtype=torch.int64).scatter_add_(1, groups, torch.ones_like(groups))[:, :total]
        body = self.lengths(gaps, groups, counts, load.size)
        return body + (varint_size(counts[:, :-1]).sum(1) if grouped else packed_size(count, load.levels))


def whole_bytes(bits: Tensor) -> Tensor:
    """Bytes that so many bits take."""
    return -(-bits // 8)


class bitmap(Places):
    """A bit for every entry, of every group."""

    def bits(self, places: list[Ints], size: int) -> bytes:
        marks = np.zeros((len(places), size), np.uint8)
        for row, group in zip(marks, places, strict=True):
            row[group] = 1
        return to_bytes(marks.reshape(-1))

    def places(self, reader: Reader, counts: list[int], size: int) -> list[Ints]:
        marks = take_bits(reader, len(counts) * size).reshape(len(counts), size)
        groups = [np.flatnonzero(row).astype(np.int64) for row in marks]
        if [len(group) for group in groups] != counts:
            raise CodecError("the bitmap has not as many places as promised")
        return groups

    def lengths(self, gaps: Tensor, groups: Tensor, counts: Tensor, size: int) -> Tensor:
        return torch.full((len(counts),), -(-counts.shape[1] * size // 8))


class positions(Places):
    """Addresses of as many bits as the last one needs."""

    def bits(self, places: list[Ints], size: int) -> bytes:
        return to_bytes(fixed(np.concatenate(places), width(size - 1)))

    def places(self, reader: Reader, counts: list[int], size: int) -> list[Ints]:
        bits, total = width(size - 1), sum(counts)
        found = numbers(take_bits(reader, bits * total), bits) if bits else np.zeros(total, np.int64)
        return np.split(found, np.cumsum(counts)[:-1])

    def lengths(self, gaps: Tensor, groups: Tensor, counts: Tensor, size: int) -> Tensor:
        return whole_bytes(counts.sum(1) * width(size - 1))


def to_gaps(places: Ints) -> Ints:
    """Entries between each place and the one before it."""
    return np.diff(places, prepend=-1) - 1


def from_gaps(gaps: Ints) -> Ints:
    """What ``to_gaps`` was given."""
    return np.cumsum(gaps + 1) - 1


class gaps(Places):
    """Entries between one place and the next, in as many bits as the largest of the group needs, which a byte says (FedZip)."""

    def bits(self, places: list[Ints], size: int) -> bytes:
        found = [to_gaps(group) for group in places]
        widths = [max(1, width(int(g.max(initial=0)))) for g in found]
        return bytes(widths) + to_bytes(*(fixed(g, bits) for g, bits in zip(found, widths, strict=True)))

    def places(self, reader: Reader, counts: list[int], size: int) -> list[Ints]:
        widths = list(reader.take(len(counts)))
        if any(not 1 <= bits <= max(1, width(size - 1)) for bits in widths):
            raise CodecError(f"gaps of {max(widths)} bits, at most {max(1, width(size - 1))} are needed")
        ends = np.cumsum([count * bits for count, bits in zip(counts, widths, strict=True)])
        parts = np.split(take_bits(reader, int(ends[-1])), ends[:-1])
        return [from_gaps(numbers(part, bits)) for part, bits in zip(parts, widths, strict=True)]

    def lengths(self, gaps: Tensor, groups: Tensor, counts: Tensor, size: int) -> Tensor:
        largest = torch.zeros(len(gaps), counts.shape[1] + 1, dtype=torch.int64).scatter_reduce_(1, groups, gaps, "amax")[:, :-1]
        widths = torch.ones_like(largest)
        for bits in range(1, 63):
            widths += (largest >= 1 << bits).long()
        return counts.shape[1] + whole_bytes((widths * counts).sum(1))
