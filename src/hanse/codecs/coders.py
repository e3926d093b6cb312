"""Ways to write places and symbols without loss.

Places are rising, so they can be a bit an entry, addresses, or gaps; symbols are packed into as few bits as their number needs, or
into Huffman's. ``grouped`` writes the places of each symbol by themselves, so that symbols cost nothing but their counts (FedZip).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
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


def _bytes(bits: Tensor) -> Tensor:
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
        return _bytes(counts.sum(1) * width(size - 1))


def _gaps(places: Ints) -> Ints:
    return np.diff(places, prepend=-1) - 1


def _from_gaps(gaps: Ints) -> Ints:
    return np.cumsum(gaps + 1) - 1


class gaps(Places):
    """Entries between one place and the next, in as many bits as the largest of the group needs, which a byte says (FedZip)."""

    def bits(self, places: list[Ints], size: int) -> bytes:
        found = [_gaps(group) for group in places]
        widths = [max(1, width(int(g.max(initial=0)))) for g in found]
        return bytes(widths) + to_bytes(*(fixed(g, bits) for g, bits in zip(found, widths, strict=True)))

    def places(self, reader: Reader, counts: list[int], size: int) -> list[Ints]:
        widths = list(reader.take(len(counts)))
        if any(not 1 <= bits <= max(1, width(size - 1)) for bits in widths):
            raise CodecError(f"gaps of {max(widths)} bits, at most {max(1, width(size - 1))} are needed")
        ends = np.cumsum([count * bits for count, bits in zip(counts, widths, strict=True)])
        parts = np.split(take_bits(reader, int(ends[-1])), ends[:-1])
        return [_from_gaps(numbers(part, bits)) for part, bits in zip(parts, widths, strict=True)]

    def lengths(self, gaps: Tensor, groups: Tensor, counts: Tensor, size: int) -> Tensor:
        largest = torch.zeros(len(gaps), counts.shape[1] + 1, dtype=torch.int64).scatter_reduce_(1, groups, gaps, "amax")[:, :-1]
        widths = torch.ones_like(largest)
        for bits in range(1, 63):
            widths += (largest >= 1 << bits).long()
        return counts.shape[1] + _bytes((widths * counts).sum(1))


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
        parts = [self.split(_gaps(group), len(group), size) for group in places]
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
        return [_from_gaps(base + rest) for (base, _), rest in zip(known, added, strict=True)]


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
        return _bytes((((gaps >> r) + 1 + r) * there).sum(1))


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
        return _bytes(((2 * bits + 1) * (groups < counts.shape[1])).sum(1))


class huffman(Coder):
    """Huffman's code of the symbols; where places were selected, of all entries, with one more symbol for those not sent.

    A byte for each symbol says how long its code is, at most 31 bits, and a varint how many bytes all codes take together; codes
    are canonical, so nothing else is needed. A layer of one symbol takes no bits.
    """

    def write(self, size: int, places: Tensor | None, symbols: Tensor | None, levels: int) -> list[Buffer]:
        if symbols is None:
            return packed().write(size, places, symbols, levels)
        from bitarray import bitarray

        dense = _dense(size, places, symbols)
        lengths = _code_lengths(np.bincount(dense, minlength=levels + (places is not None)))
        bits = bitarray(endian="little")
        if np.count_nonzero(lengths) > 1:
            bits.encode(_codes(lengths), dense.tolist())
        written = bits.tobytes()
        return [lengths.astype(np.uint8).tobytes(), varint(len(written)), written]

    def read(self, reader: Reader, size: int, count: int, placed: bool, levels: int) -> tuple[Tensor | None, Tensor | None]:
        if not levels:
            return packed().read(reader, size, count, placed, levels)
        total = size if placed else count
        lengths = np.frombuffer(reader.take(levels + placed), np.uint8).astype(np.int64)
        dense = _decoded(reader, lengths, total)
        if not placed:
            return None, torch.from_numpy(dense.astype(np.uint8))
        where = np.flatnonzero(dense)
        if len(where) != count:
            raise CodecError(f"{len(where)} places, {count} are promised")
        return torch.from_numpy(where), torch.from_numpy((dense[where] - 1).astype(np.uint8))

    def sizes(self, load: Load) -> Tensor:
        if load.symbols is None:
            return packed().sizes(load)
        placed = load.places is not None
        alphabet = load.levels + placed
        counted, there = load.symbols.cpu().long() + placed, load.there
        if there is not None:
            counted = torch.where(there.cpu(), counted, alphabet)
        ones = torch.ones_like(counted)
        counts = torch.zeros(len(counted), alphabet + 1, dtype=torch.int64).scatter_add_(1, counted, ones)[:, :alphabet]
        if placed:
            counts[:, 0] = load.size - load.lengths.cpu()
        bits = [int(row @ lengths) if np.count_nonzero(lengths := _code_lengths(row)) > 1 else 0 for row in counts.numpy()]
        payload = _bytes(torch.tensor(bits, dtype=torch.int64))
        return alphabet + varint_size(payload) + payload


def _dense(size: int, places: Tensor | None, symbols: Tensor) -> Ints:
    if places is None:
        return symbols.numpy().astype(np.int64)
    dense = np.zeros(size, np.int64)
    dense[places.numpy()] = symbols.numpy().astype(np.int64) + 1
    return dense


def _code_lengths(counts: Ints) -> Ints:
    """Length of each symbol's code; 0 for symbols that do not occur."""
    from bitarray.util import canonical_huffman

    lengths = np.zeros(len(counts), np.int64)
    there = {s: int(n) for s, n in enumerate(counts.tolist()) if n}
    for symbol, code in canonical_huffman(Counter(there))[0].items() if there else ():
        lengths[symbol] = len(code)
    return lengths if lengths.max(initial=0) < 32 else _code_lengths(-(-counts // 2))  # flatter, so that no code is longer


def _canonical(lengths: Ints) -> tuple[list[int], list[int]]:
    """How many codes there are of each length, and the symbols in the order of their codes."""
    order = sorted((int(n), s) for s, n in enumerate(lengths) if n)
    counts = np.bincount([n for n, _ in order], minlength=1)
    return counts.tolist(), [s for _, s in order]


def _codes(lengths: Ints) -> dict[int, Any]:
    from bitarray.util import int2ba

    _, symbols = _canonical(lengths)
    codes, code, before = {}, 0, 0
    for s in symbols:
        code <<= int(lengths[s]) - before
        before = int(lengths[s])
        codes[s] = int2ba(code, length=before, endian="big")
        code += 1
    return codes


def _decoded(reader: Reader, lengths: Ints, total: int) -> Ints:
    """``total`` symbols."""
    from bitarray import bitarray
    from bitarray.util import canonical_decode

    counts, symbols = _canonical(lengths)
    data = bytes(reader.take(reader.varint(reader.left)))
    if len(symbols) < 2 or not total:
        if data or len(symbols) != min(1, total):
            raise CodecError(f"{len(symbols)} symbols and {len(data)} bytes for {total} entries")
        return np.full(total, symbols[0] if symbols else 0, np.int64)
    if len(counts) > 32 or sum(n * 2.0**-i for i, n in enumerate(counts)) != 1:
        raise CodecError("the lengths are not those of a Huffman code")
    bits = bitarray(endian="little")
    bits.frombytes(data)
    dense = np.fromiter(islice(_stopping(canonical_decode(bits, counts, symbols)), total), np.int64)
    used = int(lengths[dense].sum())
    if len(dense) < total or len(data) != -(-used // 8) or bits[used:].any():
        raise CodecError(f"{len(data)} bytes do not hold {total} symbols")
    return dense


def _stopping(symbols: Iterator[int]) -> Iterator[int]:
    """Symbols up to where the bits end."""
    with suppress(ValueError):
        yield from symbols


class shortest(Coder):
    """The shortest of several coders, which a byte names; FedZip's three by default."""

    coders: tuple[Coder, ...] = Field(
        default=(huffman(), positions(grouped=True), gaps(grouped=True)), min_length=1, max_length=256
    )
    """Which."""

    def write(self, size: int, places: Tensor | None, symbols: Tensor | None, levels: int) -> list[Buffer]:
        count = len(places if places is not None else symbols if symbols is not None else ())
        rows = (None if places is None else places[None]), (None if symbols is None else symbols[None])
        load = Load("", (size,), size, torch.empty(1, count), places=rows[0], symbols=rows[1], levels=levels)
        lengths = [int(coder.sizes(load)) for coder in self.coders]
        best = lengths.index(min(lengths))
        return [bytes([best]), *self.coders[best].write(size, places, symbols, levels)]

    def read(self, reader: Reader, size: int, count: int, placed: bool, levels: int) -> tuple[Tensor | None, Tensor | None]:
        best = reader.take(1)[0]
        if best >= len(self.coders):
            raise CodecError(f"coder {best}, there are {len(self.coders)}")
        return self.coders[best].read(reader, size, count, placed, levels)

    def sizes(self, load: Load) -> Tensor:
        return 1 + torch.stack([coder.sizes(load) for coder in self.coders]).amin(0)
