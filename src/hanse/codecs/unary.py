"""Codes of gaps that begin with a number in unary: Golomb-Rice and Elias."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hanse.codecs.coders import Bits, Ints, Places, from_bytes, from_gaps, to_bytes, to_gaps, whole_bytes, width
from hanse.codecs.wire import Reader
from hanse.core.errors import CodecError


class Unary(Places):
    """Base of the codes of gaps that begin with some ones and a zero. All beginnings are written first, then all the rest."""

    abstract: ClassVar[bool] = True

    def split(self, gaps: Ints, count: int, size: int) -> tuple[Ints, Ints, Ints]:
        """Ones, remaining number and its bits, of each gap among ``count`` in ``size`` entries."""
        raise TypeError(f"{type(self).__name__} does not define split")

    def rest(self, ones: Ints, count: int, size: int) -> tuple[Ints, Ints]:
        """From the ones: what they stand for, and the bits of what remains to be added."""
        raise TypeError(f"{type(self).__name__} does not define rest")

    def bits(self, places: list[Ints], size: int) -> bytes:
        parts = [self.split(to_gaps(group), len(group), size) for group in places]
        ones, values, widths = (np.concatenate(column) for column in zip(*parts, strict=True))
        beginnings = np.ones(int((ones + 1).sum()), np.uint8)
        beginnings[np.cumsum(ones + 1) - 1] = 0
        return to_bytes(beginnings, _ragged(values, widths))

    def places(self, reader: Reader, counts: list[int], size: int) -> list[Ints]:
        ones, tail = _beginnings(reader, sum(counts))
        groups = np.split(ones, np.cumsum(counts)[:-1])
        known = [self.rest(group, count, size) for group, count in zip(groups, counts, strict=True)]
        widths = np.concatenate([bits for _, bits in known])
        total = int(widths.sum())
        more = from_bytes(reader.take(-(-max(0, total - len(tail)) // 8)), max(0, total - len(tail)))
        if len(tail) > total and tail[total:].any():
            raise CodecError("the bits after the last are not zero")
        added = np.split(_from_ragged(np.concatenate([tail, more])[:total], widths), np.cumsum(counts)[:-1])
        return [from_gaps(base + rest) for (base, _), rest in zip(known, added, strict=True)]


def _ragged(values: Ints, widths: Ints) -> Bits:
    """Numbers in ``widths`` bits each, lowest first."""
    owner, bit = _owners(widths)
    return ((values[owner] >> bit) & 1).astype(np.uint8)


def _from_ragged(bits: Bits, widths: Ints) -> Ints:
    owner, bit = _owners(widths)
    values = np.zeros(len(widths), np.int64)
    np.add.at(values, owner, bits.astype(np.int64) << bit)
    return values


def _owners(widths: Ints) -> tuple[Ints, Ints]:
    """For every bit of numbers of these widths, whose it is and which."""
    owner = np.repeat(np.arange(len(widths)), widths)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(widths) - widths, widths)


def _beginnings(reader: Reader, count: int) -> tuple[Ints, Bits]:
    """The ones before each of ``count`` zeros, and the bits that are left of the last byte they were in."""
    if not count:
        return np.zeros(0, np.int64), np.zeros(0, np.uint8)
    look = min(reader.left, -(-count // 4))
    while True:
        bits = np.unpackbits(np.frombuffer(reader.data[reader.at : reader.at + look], np.uint8), bitorder="little")
        zeros = np.flatnonzero(bits == 0)
        if len(zeros) >= count:
            break
        if look == reader.left:
            raise CodecError(f"the body ends early: {count} places are promised, {len(zeros)} begin")
        look = min(reader.left, 2 * look + 1)
    end = int(zeros[count - 1]) + 1
    used = -(-end // 8)
    reader.take(used)
    return np.diff(zeros[:count], prepend=-1) - 1, bits[end : 8 * used]


class golomb(Unary):
    """Golomb-Rice codes: gap divided by ``2^r`` in unary, the remainder in ``r`` bits, ``r`` by the density of the group.

    The best code of its kind where entries are kept independently (Golomb, "Run-length encodings", 1966; Rice, 1979).
    """

    def split(self, gaps: Ints, count: int, size: int) -> tuple[Ints, Ints, Ints]:
        r = _rice(size, count)
        return gaps >> r, gaps & ((1 << r) - 1), np.full(len(gaps), r)

    def rest(self, ones: Ints, count: int, size: int) -> tuple[Ints, Ints]:
        r = _rice(size, count)
        return ones << r, np.full(len(ones), r)

    def lengths(self, gaps: Tensor, groups: Tensor, counts: Tensor, size: int) -> Tensor:
        each = torch.tensor([[_rice(size, n) for n in row] for row in counts.tolist()]).view(counts.shape)
        r = torch.cat([each, torch.zeros_like(each[:, :1])], 1).gather(1, groups)
        there = groups < counts.shape[1]
        return whole_bytes((((gaps >> r) + 1 + r) * there).sum(1))


@lru_cache(maxsize=65536)
def _rice(size: int, count: int) -> int:
    """The exponent whose code is shortest for ``count`` places in ``size``: the least with ``2^r >= ln(golden ratio) (gap + 1/2)``,
    where gap is the mean one (Kiely, "Selecting the Golomb parameter in Rice coding", 2004).
    """
    count = max(1, count)
    return max(0, -(-481 * (2 * size - count) // (2000 * count)) - 1).bit_length()


class elias(Unary):
    """Elias' gamma code of the gap plus one: its length in unary, then its bits (Elias, 1975). It needs to know nothing."""

    def split(self, gaps: Ints, count: int, size: int) -> tuple[Ints, Ints, Ints]:
        widths = np.frexp((gaps + 1).astype(np.float64))[1].astype(np.int64) - 1
        return widths, gaps + 1 - (1 << widths), widths

    def rest(self, ones: Ints, count: int, size: int) -> tuple[Ints, Ints]:
        if ones.max(initial=0) > width(size):
            raise CodecError(f"a gap of more than {ones.max()} bits in a layer of {size} entries")
        return (1 << ones) - 1, ones

    def lengths(self, gaps: Tensor, groups: Tensor, counts: Tensor, size: int) -> Tensor:
        bits = torch.frexp((gaps + 1).double())[1].long() - 1
        return whole_bytes(((2 * bits + 1) * (groups < counts.shape[1])).sum(1))
