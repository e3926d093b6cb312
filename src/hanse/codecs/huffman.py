"""Huffman's code of symbols, and the shortest of several coders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hanse.codecs.chain import Coder, Load
from hanse.codecs.coders import Ints, gaps, packed, positions, whole_bytes
from hanse.codecs.wire import Buffer, Reader, varint, varint_size
from hanse.core.errors import CodecError


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
        payload = whole_bytes(torch.tensor(bits, dtype=torch.int64))
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
