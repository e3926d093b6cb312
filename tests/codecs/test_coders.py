"""Each way to write places and symbols: what it writes by its definition, how long that is, and what it refuses."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanse.codecs import Codec, bitmap, elias, gaps, golomb, huffman, packed, positions, shortest
from hanse.codecs.chain import Coder, Load
from hanse.codecs.wire import Buffer, Reader, varint
from hanse.core.errors import CodecError

PLACED: list[Coder] = [
    *(packed(), bitmap(), positions(), gaps(), golomb(), elias()),
    *(bitmap(grouped=True), positions(grouped=True), gaps(grouped=True), golomb(grouped=True), elias(grouped=True)),
]
EVERY: list[Coder] = [*PLACED, huffman(), shortest(), shortest((gaps(), elias()))]
Case = tuple[int, list[int], list[int], int]


@st.composite
def cases(draw: st.DrawFn, least: int = 0) -> Case:
    """Size, places, symbols, levels."""
    size = draw(st.one_of(st.integers(max(1, least), 40), st.sampled_from([255, 256, 257, 1000])))
    chosen = draw(st.one_of(st.sets(st.integers(0, size - 1), min_size=least), st.just(set(range(size)))))
    levels = draw(st.sampled_from([1, 2, 3, 4, 5, 16, 17, 255, 256]))
    symbols = draw(st.lists(st.integers(0, levels - 1), min_size=len(chosen), max_size=len(chosen)))
    return size, sorted(chosen), symbols, levels


def write(coder: Coder, size: int, places: list[int] | None, symbols: list[int] | None = None, levels: int = 0) -> bytes:
    there = None if places is None else torch.tensor(places, dtype=torch.int64)
    return b"".join(coder.write(size, there, None if symbols is None else torch.tensor(symbols, dtype=torch.uint8), levels))


def load(many: list[tuple[list[int], list[int]]], size: int, levels: int, placed: bool, quantised: bool) -> Load:
    """Several clients' places and symbols side by side."""
    most = max(len(places) for places, _ in many)
    at = torch.tensor([places + [size] * (most - len(places)) for places, _ in many], dtype=torch.int64).view(len(many), most)
    symbols = torch.tensor([s + [0] * (most - len(s)) for _, s in many], dtype=torch.uint8).view(len(many), most)
    return Load(
        name="",
        shape=(size,),
        size=size,
        values=torch.zeros(len(many), most),
        counts=torch.tensor([len(places) for places, _ in many]),
        places=at if placed else None,
        symbols=symbols if quantised else None,
        levels=levels if quantised else 0,
    )


@pytest.mark.parametrize("coder", EVERY, ids=str)
@given(cases(), st.sampled_from(["places", "symbols", "both"]), st.binary(max_size=3))
def test_what_is_written_reads_back_and_leaves_what_follows(coder: Coder, case: Case, what: str, after: bytes) -> None:
    size, places, symbols, levels = case
    placed, quantised = what != "symbols", what != "places"
    data = write(coder, size, places if placed else None, symbols if quantised else None, levels if quantised else 0)
    reader = Reader(data + after)
    at, found = coder.read(reader, size, len(places), placed, levels if quantised else 0)
    assert (None if at is None else at.tolist()) == (places if placed else None)
    assert (None if found is None else found.tolist()) == (symbols if quantised else None)
    assert bytes(reader.take(reader.left)) == after


@pytest.mark.parametrize("coder", EVERY, ids=str)
@given(st.lists(cases(), min_size=1, max_size=4), st.sampled_from(["places", "symbols", "both"]))
def test_sizes_are_said_without_writing(coder: Coder, several: list[Case], what: str) -> None:
    """Of clients that send different numbers of entries, side by side."""
    size, levels = max(case[0] for case in several), max(case[3] for case in several)
    placed, quantised = what != "symbols", what != "places"
    said = coder.sizes(load([case[1:3] for case in several], size, levels, placed, quantised))
    for (_, places, symbols, _), n in zip(several, said.tolist(), strict=True):
        written = write(coder, size, places if placed else None, symbols if quantised else None, levels if quantised else 0)
        assert len(written) == n


@given(cases())
def test_packed_symbols_and_plain_places(case: Case) -> None:
    size, places, symbols, levels = case
    packed_bits = math.ceil(len(places) * math.ceil(math.log2(levels)) / 8)
    assert len(write(packed(), size, places)) == 4 * len(places)
    assert len(write(packed(), size, None, symbols, levels)) == packed_bits
    assert len(write(packed(), size, places, symbols, levels)) == 4 * len(places) + packed_bits


def bits(data: Buffer) -> list[int]:
    """Of each byte the lowest first."""
    return [byte >> i & 1 for byte in bytes(data) for i in range(8)]


def lowest_first(n: int, width: int) -> list[int]:
    return [n >> i & 1 for i in range(width)]


def padded(wanted: list[int]) -> list[int]:
    return wanted + [0] * (-len(wanted) % 8)


def test_symbols_are_packed_lowest_bit_first() -> None:
    for levels, width in ((2, 1), (3, 2), (8, 3), (16, 4), (17, 5), (200, 8)):
        symbols = [i * 7 % levels for i in range(19)]
        assert bits(write(packed(), 0, None, symbols, levels)) == padded([b for s in symbols for b in lowest_first(s, width)])


@given(cases())
def test_a_bitmap_is_a_bit_an_entry(case: Case) -> None:
    size, places, symbols, levels = case
    data = write(bitmap(), size, places)
    assert len(data) == math.ceil(size / 8) and bits(data) == padded([int(i in set(places)) for i in range(size)])
    grouped = write(bitmap(grouped=True), size, places, symbols, levels)
    counts = [varint(symbols.count(s)) for s in range(levels - 1)]
    assert grouped[: (used := sum(map(len, counts)))] == b"".join(counts) and len(grouped) == used + math.ceil(levels * size / 8)


@given(cases())
def test_positions_are_addresses_of_as_many_bits_as_needed(case: Case) -> None:
    size, places, symbols, levels = case
    width = math.ceil(math.log2(size))
    assert bits(write(positions(), size, places)) == padded([b for p in places for b in lowest_first(p, width)])
    assert len(write(positions(), size, places)) == math.ceil(len(places) * width / 8)
    by_symbol = [p for s in range(levels) for p, q in zip(places, symbols, strict=True) if q == s]
    counts = b"".join(varint(symbols.count(s)) for s in range(levels - 1))
    grouped = write(positions(grouped=True), size, places, symbols, levels)
    assert grouped == counts + write(positions(), size, by_symbol)


def gaps_of(places: list[int]) -> list[int]:
    return [b - a - 1 for a, b in zip([-1, *places], places, strict=False)]


@given(cases())
def test_gaps_take_as_many_bits_as_the_largest_of_their_group(case: Case) -> None:
    size, places, symbols, levels = case
    groups = [gaps_of([p for p, q in zip(places, symbols, strict=True) if q == s]) for s in range(levels)]
    widths = [max(1, max(group, default=0).bit_length()) for group in groups]
    counts = b"".join(varint(len(group)) for group in groups[:-1])
    data = write(gaps(grouped=True), size, places, symbols, levels)
    assert data[: len(counts) + levels] == counts + bytes(widths)
    wanted = [b for group, width in zip(groups, widths, strict=True) for g in group for b in lowest_first(g, width)]
    assert bits(data[len(counts) + levels :]) == padded(wanted)


def rice(gap: int, r: int) -> tuple[list[int], list[int]]:
    return [1] * (gap >> r) + [0], lowest_first(gap & ((1 << r) - 1), r)


def gamma(gap: int) -> tuple[list[int], list[int]]:
    """Elias' code of gap + 1: as many ones as it has bits after the first, a zero, those bits."""
    n = (gap + 1).bit_length() - 1
    return [1] * n + [0], lowest_first(gap + 1 - (1 << n), n)


def exponent(size: int, count: int) -> int:
    """The least r with 2^r >= 0.481 (mean gap + 1/2); the logarithm of the golden ratio is about 0.481."""
    mean = Fraction(size - max(1, count), max(1, count))
    return next(r for r in range(40) if 2**r >= Fraction(481, 1000) * (mean + Fraction(1, 2)))


@given(cases())
def test_golomb_and_elias_by_their_definitions(case: Case) -> None:
    """All beginnings, then all the rest."""
    size, places, _, _ = case
    r = exponent(size, len(places))
    for coder, codes in ((golomb(), [rice(g, r) for g in gaps_of(places)]), (elias(), [gamma(g) for g in gaps_of(places)])):
        wanted = [b for first, _ in codes for b in first] + [b for _, rest in codes for b in rest]
        assert bits(write(coder, size, places)) == padded(wanted)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.07, 0.1, 0.2, 0.4, 0.5])
def test_golombs_exponent_is_within_a_percent_of_the_best_one(density: float) -> None:
    n = 200_000
    places = torch.nonzero(torch.rand(n, generator=torch.Generator().manual_seed(0)) < density).flatten().tolist()
    found = np.array(gaps_of(places))
    best = min(int(((found >> r) + 1 + r).sum()) for r in range(20))
    entropy = n * -(density * math.log2(density) + (1 - density) * math.log2(1 - density))
    assert 0.99 * entropy <= 8 * len(write(golomb(), n, places)) <= 1.01 * best + 8 and best <= 1.06 * entropy


def huffman_bits(counts: list[int]) -> int:
    """Bits of the best prefix code, by Huffman's algorithm."""
    heap = [n for n in counts if n]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        heapq.heappush(heap, merged)
        total += merged
    return total


@given(st.lists(st.integers(0, 16), min_size=1, max_size=300))
def test_huffman_is_the_best_prefix_code_and_close_to_the_entropy(symbols: list[int]) -> None:
    data, n = write(huffman(), 0, None, symbols, 17), len(symbols)
    counts = Counter(symbols)
    total, entropy = huffman_bits(list(counts.values())), sum(m / n * math.log2(n / m) for m in counts.values())
    assert len(data) == 17 + len(varint(math.ceil(total / 8))) + math.ceil(total / 8)
    assert n * entropy <= total + 1e-6 and total <= n * (entropy + 1)
    lengths = list(data[:17])
    assert {s for s, length in enumerate(lengths) if length} == set(symbols)
    if len(counts) > 1:
        assert sum(counts[s] * lengths[s] for s in counts) == total and sum(2.0**-x for x in lengths if x) == 1


@given(st.integers(10, 400), st.data())
def test_of_three_symbols_the_most_frequent_takes_one_bit_and_the_others_two(n: int, data: st.DataObject) -> None:
    """n + m bits, where m entries are sent in two symbols and all others are zero."""
    places = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=2, max_size=n // 3)))
    symbols = [0, 1, *data.draw(st.lists(st.integers(0, 1), min_size=len(places) - 2, max_size=len(places) - 2))]
    written, payload = write(huffman(), n, places, symbols, 2), math.ceil((n + len(places)) / 8)
    assert len(written) == 3 + len(varint(payload)) + payload and sorted(written[:3]) == [1, 2, 2] and written[0] == 1


def test_huffmans_codes_are_never_longer_than_31_bits() -> None:
    """Counts like Fibonacci's numbers make the longest codes."""
    counts = [1, 1]
    while len(counts) < 27:
        counts.append(counts[-1] + counts[-2])
    symbols = torch.from_numpy(np.repeat(np.arange(27, dtype=np.uint8), counts))
    data = b"".join(huffman().write(0, None, symbols, 27))
    assert max(data[:27]) == 26
    found = huffman().read(Reader(data), 0, len(symbols), False, 27)[1]
    assert found is not None and torch.equal(found, symbols)


def test_code_lengths_are_flattened_until_they_fit() -> None:
    from hanse.codecs.huffman import _code_lengths

    counts = [1, 1]
    while len(counts) < 40:
        counts.append(counts[-1] + counts[-2])
    lengths = _code_lengths(np.array(counts))
    assert lengths.max() <= 31 and sum(2.0**-x for x in lengths.tolist()) <= 1


@given(cases())
def test_the_shortest_is_the_shortest(case: Case) -> None:
    size, places, symbols, levels = case
    coders: list[Coder] = [huffman(), positions(grouped=True), gaps(grouped=True)]
    written = [write(coder, size, places, symbols, levels) for coder in coders]
    best = min(range(3), key=lambda i: len(written[i]))
    assert write(shortest(), size, places, symbols, levels) == bytes([best]) + written[best]


@pytest.mark.parametrize("coder", EVERY, ids=str)
@given(cases(least=1), st.integers(0, 10**6))
def test_what_is_cut_short_is_refused(coder: Coder, case: Case, cut: int) -> None:
    size, places, symbols, levels = case
    data = write(coder, size, places, symbols, levels)
    if data:
        with pytest.raises(CodecError):
            coder.read(Reader(data[: cut % len(data)]), size, len(places), True, levels)


MALFORMED: list[tuple[str, Coder, bytes, int, int, bool, int]] = [
    ("a place twice", packed(), bytes([1, 0, 0, 0, 1, 0, 0, 0]), 10, 2, True, 0),
    ("places that fall", packed(), bytes([2, 0, 0, 0, 1, 0, 0, 0]), 10, 2, True, 0),
    ("a place beyond the end", packed(), bytes([10, 0, 0, 0]), 10, 1, True, 0),
    ("a place of 2^31 and more", packed(), bytes([255] * 4), 10, 1, True, 0),
    ("a symbol of three", packed(), bytes([3]), 0, 1, False, 3),
    ("a symbol of 255", packed(), bytes([255]), 0, 1, False, 255),
    ("bits after the last symbol", packed(), bytes([4]), 0, 1, False, 4),
    ("bits after the last of five", packed(), bytes([32]), 0, 1, False, 17),
    ("a bitmap of too few", bitmap(), bytes([1]), 8, 2, True, 0),
    ("a bitmap of too many", bitmap(), bytes([7]), 8, 2, True, 0),
    ("a bitmap of more than there are", bitmap(), bytes([129]), 7, 1, True, 0),
    ("an entry in two groups", bitmap(grouped=True), bytes([1, 0b10001]), 4, 2, True, 2),
    ("more in a group than promised", bitmap(grouped=True), bytes([3, 7]), 4, 2, True, 2),
    ("an address beyond the end", positions(), bytes([15]), 10, 1, True, 0),
    ("addresses that fall", positions(), bytes([0x12]), 10, 2, True, 0),
    ("gaps of no bits", gaps(), bytes([0]), 10, 2, True, 0),
    ("gaps of too many bits", gaps(), bytes([5, 0, 0]), 10, 1, True, 0),
    ("gaps beyond the end", gaps(), bytes([4, 15]), 10, 1, True, 0),
    ("ones without end", golomb(), bytes([255] * 8), 10, 1, True, 0),
    ("ones beyond the end", golomb(), bytes([0xFF, 0x0F, 0]), 10, 1, True, 0),
    ("bits after the last gap", elias(), bytes([0b10]), 10, 1, True, 0),
    ("a gap of 40 bits", elias(), bytes([255] * 5 + [0] * 6), 10, 1, True, 0),
    ("codes of which there cannot be so many", huffman(), bytes([1, 1, 1, 1, 0]), 0, 3, False, 3),
    ("codes of 60 bits", huffman(), bytes([60, 60, 1, 0]), 0, 3, False, 2),
    ("a code that is none", huffman(), bytes([2, 2, 1, 3]), 0, 2, False, 2),
    ("more bytes than codes", huffman(), bytes([1, 1, 2, 1, 0]), 0, 3, False, 2),
    ("bits after the last code", huffman(), bytes([1, 1, 1, 8]), 0, 3, False, 2),
    ("bytes for a single symbol", huffman(), bytes([1, 0, 1, 0]), 0, 3, False, 2),
    ("no symbol at all", huffman(), bytes([0, 0, 0]), 0, 3, False, 2),
    ("symbols for nothing", huffman(), bytes([1, 0, 0]), 0, 0, False, 2),
    ("more places than promised", huffman(), bytes([1, 1, 0, 1, 7]), 4, 2, True, 2),
    ("no such coder", shortest(), bytes([3]), 10, 1, True, 2),
]


@pytest.mark.parametrize(
    ("coder", "data", "size", "count", "placed", "levels"), [m[1:] for m in MALFORMED], ids=[m[0] for m in MALFORMED]
)
def test_what_no_writer_makes_is_refused(coder: Coder, data: bytes, size: int, count: int, placed: bool, levels: int) -> None:
    with pytest.raises(CodecError):
        coder.read(Reader(data), size, count, placed, levels)


def test_a_chain_of_a_coder_alone_is_lossless() -> None:
    x = torch.randn(100)
    assert torch.equal(Codec.parse("gaps").decode(Codec.parse("gaps").encode(x)), x)
