"""Every kind of chain: bytes and back, alone and side by side."""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanse.codecs import Codec, Sending
from hanse.codecs.wire import FRAME
from hanse.core.errors import CodecError, ConfigError
from hanse.core.layout import Layout

SELECT = ["topk(0.1)", "threshold(1)", "randomk(0.2)", ""]
QUANTISE = [
    *("uniform(8)", "uniform(3)", "uniform(2, stochastic=True)", "int8", "int8(32)", "nf4", "sign", "ternary", "kmeans(3)"),
    *("kmeans(16)", "cast", "cast('float16')", ""),
]
CODE = [
    *("bitmap", "positions", "gaps", "golomb", "elias", "huffman", "shortest"),
    *("gaps(grouped=True)", "bitmap(grouped=True)", "golomb(grouped=True)", ""),
]
LAYOUT = Layout({"a.weight": (20, 12), "a.bias": (20,), "one": (), "none": (0, 3), "b.weight": (10, 20), "b.bias": (10,)})


def chained(*stages: str) -> str:
    return " | ".join(stage for stage in stages if stage)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    """Ordinary numbers, tiny ones, many zeros, only zeros, one that is not a number, one that is infinite, huge ones, ties."""
    x = torch.randn(8, LAYOUT.size, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[1] *= 1e-30
    x[2, :300] = 0
    x[3] = 0
    x[4, 7], x[5, 9] = torch.nan, -torch.inf
    x[6] *= torch.finfo(dtype).max / 8
    x[7] = x[7].round()
    return x


def sending(*seeds: int) -> Sending:
    return Sending(LAYOUT, torch.tensor(seeds))


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("layered", ["layers", ""])
@pytest.mark.parametrize("select", SELECT)
def test_what_arrives_is_the_same_with_and_without_bytes(layered: str, select: str) -> None:
    """Bit for bit, with the same number of bytes, through every quantiser and every coder; in layers, every third pair of these."""
    x, seeds = rows(), list(range(70, 78))
    for quantise, code in list(itertools.product(QUANTISE, CODE))[:: 3 if layered else 1]:
        text = chained(layered, select, quantise, code) or "packed"
        codec = Codec.parse(text)
        sent = codec.roundtrip(x.clone(), sending(*seeds))
        for row, seed, got, size in zip(x, seeds, sent.values, sent.sizes.tolist(), strict=True):
            data = codec.encode(row, sending(seed))
            assert len(data) == size, text
            assert bits(codec.decode(data, LAYOUT)) == bits(got), text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "text", ["topk(0.1) | gaps | zstd", "layers | kmeans(4) | huffman", "uniform(4)", "randomk(0.5) | int8(16)"]
)
def test_other_types_arrive_as_they_left(text: str, dtype: torch.dtype) -> None:
    codec, x = Codec.parse(text), rows().to(dtype)
    sent = codec.roundtrip(x.clone(), sending(*range(8)))
    for i, row in enumerate(x):
        data = codec.encode(row, sending(i))
        got = codec.decode(data, LAYOUT)
        assert got.dtype == dtype and bits(got) == bits(sent.values[i]) and len(data) == int(sent.sizes[i])


def test_a_layer_that_is_not_finite_travels_as_it_is_and_the_others_do_not() -> None:
    codec = Codec.parse("layers | topk(0.1)")
    x = rows()[4]
    got = codec.decode(codec.encode(x, sending(0)), LAYOUT)
    assert bits(got[:240]) == bits(x[:240]) and int((got[261:461] != 0).sum()) == 20


@pytest.mark.parametrize("text", ["gaps | topk(0.1)", "topk(0.1) | topk(0.2)", "zstd | uniform", "topk | layers", "uniform | nf4"])
def test_stages_out_of_order_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="in this order and at most one of each"):
        Codec.parse(text)


@pytest.mark.parametrize(
    "text", ["topk(0.1)", "layers | topk(0.1) | kmeans(2) | gaps(grouped=True)", "feedback(topk(0.5) | sign | zstd)"]
)
def test_a_chain_reads_back_from_its_text(text: str) -> None:
    codec = Codec.parse(text)
    assert Codec.parse(str(codec)) == codec == Codec.parse(codec.full())


def test_stages_are_joined_by_a_bar_in_python_too() -> None:
    a, b, c = (Codec.parse(name) for name in ("topk(0.1)", "uniform(4)", "zstd"))
    assert (a | b) | c == a | (b | c) == Codec.parse("topk(0.1) | uniform(4) | zstd")


FUZZED = [
    "topk(0.1)",
    "layers | topk(0.2) | kmeans(2) | shortest",
    "topk(0.1) | uniform(3) | golomb",
    "threshold(1) | sign | elias",
    "topk(0.3) | nf4 | bitmap(grouped=True)",
    "kmeans(5) | huffman",
    "randomk(0.1) | int8(7)",
    "topk(0.1) | zstd",
    "layers | lowrank(2) | uniform(4) | zstd",
    "layers | projections(5) | int8",
]


@pytest.mark.parametrize("text", FUZZED)
@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), st.integers(-3, 3), st.booleans())
def test_damaged_bytes_are_refused_or_give_a_vector(text: str, changes: list[tuple[int, int]], longer: int, fixed: bool) -> None:
    """A wrong checksum is always refused; behind a right one anything may stand: a vector of the right size, or CodecError."""
    codec, x = Codec.parse(text), rows()[0]
    whole = codec.encode(x, sending(3))
    data = bytearray(whole + bytes(max(0, longer)))[: len(whole) + longer]
    for place, byte in changes:
        data[place % len(data)] = byte
    if bytes(data) == whole:
        return
    if not fixed:
        with pytest.raises(CodecError):
            codec.decode(bytes(data), LAYOUT)
        return
    data[4:8] = zlib.crc32(data[8:], zlib.crc32(data[:4])).to_bytes(4, "little")
    try:
        got = codec.decode(bytes(data), LAYOUT)
    except CodecError as error:
        assert "\n" not in str(error)
    else:
        assert got.shape == (LAYOUT.size,)


@pytest.mark.parametrize("text", ["topk(0.1)", "randomk(0.1)", "kmeans(2) | huffman", "uniform | zstd"])
def test_a_promise_of_a_terabyte_is_refused(text: str) -> None:
    data = bytearray(Codec.parse(text).encode(torch.randn(100)))
    data[8:16] = (1 << 38).to_bytes(8, "little")
    data[4:8] = zlib.crc32(data[8:], zlib.crc32(data[:4])).to_bytes(4, "little")
    with pytest.raises(CodecError, match="promises 274877906944 entries"):
        Codec.parse(text).decode(bytes(data))


def test_topk_takes_eight_bytes_an_entry() -> None:
    """A place and a value; the frame and how many there are."""
    for n, k in ((1000, 100), (100_000, 10_000)):
        assert len(Codec.parse("topk(0.1)").encode(torch.randn(n))) == FRAME.size + 1 + (k > 126) + 8 * k
