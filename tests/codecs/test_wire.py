"""The frame byte by byte, lengths, and a reader that takes nothing on trust."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanse.codecs import cast
from hanse.codecs.wire import DTYPES, FRAME, LIMIT, Reader, frame, raw, unframe, varint, varint_size
from hanse.core.errors import CodecError


def made(body: bytes = b"abc", n: int = 3, kind: int = 0, version: int = 1, magic: bytes = b"hz") -> bytes:
    """A frame, written down independently."""
    head, tail = magic + bytes([version, kind]), n.to_bytes(8, "little") + body
    return head + zlib.crc32(head + tail).to_bytes(4, "little") + tail


@pytest.mark.parametrize("kind", range(len(DTYPES)))
def test_the_frame_byte_by_byte(kind: int) -> None:
    data = frame(torch.zeros(258, dtype=DTYPES[kind]), [b"ab", memoryview(b"c")])
    assert data == made(b"abc", 258, kind)
    assert data[:4] == b"hz\x01" + bytes([kind]) and data[8:16] == bytes([2, 1, 0, 0, 0, 0, 0, 0]) and data[16:] == b"abc"
    n, dtype, reader = unframe(data, 258)
    assert (n, dtype, bytes(reader.take(3)), reader.left, FRAME.size) == (258, DTYPES[kind], b"abc", 0, 16)


def test_numbers_are_little_endian() -> None:
    """A whole message, whatever machine it was made on."""
    assert cast("float32").encode(torch.tensor([1.0, -2.0])) == made(struct.pack("<B2f", 3, 1.0, -2.0), 2)
    assert bytes(raw(torch.tensor([258, 1], dtype=torch.int32))) == bytes([2, 1, 0, 0, 1, 0, 0, 0])


def test_types_that_do_not_travel_are_refused() -> None:
    with pytest.raises(CodecError, match=r"torch.int32 is not allowed: torch.float32"):
        frame(torch.zeros(2, dtype=torch.int32), [])


@given(st.integers(0, 8 * len(made()) - 1))
def test_every_bit_is_checked(bit: int) -> None:
    data = bytearray(made())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CodecError):
        unframe(bytes(data), 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes, at least 16"),
        (made()[:15], "15 bytes, at least 16"),
        (made(version=2), "not a frame of version 1"),
        (made(magic=b"zh"), "not a frame of version 1"),
        (made(kind=4), "not a frame of version 1"),
        (made()[:-1], "checksum"),
        (made() + b"\0", "checksum"),
        (made(n=4), "promises 4 entries, 3 are allowed"),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        unframe(data, 3)


def test_without_a_size_a_limit_holds() -> None:
    assert unframe(made(n=LIMIT))[0] == LIMIT
    with pytest.raises(CodecError, match=f"promises {LIMIT + 1} entries, at most {LIMIT} are allowed"):
        unframe(made(n=LIMIT + 1))


@given(st.one_of(st.integers(0, 2**62), st.integers(0, 62).map(lambda b: 2**b - 1), st.integers(0, 300)), st.binary(max_size=3))
def test_a_length_reads_back_in_as_many_bytes_as_said(n: int, after: bytes) -> None:
    data = varint(n)
    assert len(data) == max(1, -(-n.bit_length() // 7)) == int(varint_size(torch.tensor(n)))
    reader = Reader(data + after)
    assert reader.varint(n) == n and reader.left == len(after)


@pytest.mark.parametrize("n", [0, 127, 128, 300, 2**14])
def test_lengths_are_leb128(n: int) -> None:
    assert varint(n) == {0: b"\0", 127: b"\x7f", 128: b"\x80\x01", 300: b"\xac\x02", 2**14: b"\x80\x80\x01"}[n]


@pytest.mark.parametrize(
    "data", [b"\x80", b"", b"\x80\x00", b"\x81\x80\x00", b"\xff" * 9, b"\xff" * 20, b"\x65", varint(2**40)], ids=bytes.hex
)
def test_a_length_too_large_cut_short_or_not_the_shortest_is_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        Reader(data).varint(100)


@given(st.binary(max_size=40), st.lists(st.integers(0, 20), max_size=6))
def test_a_reader_gives_what_is_there_and_no_more(data: bytes, sizes: list[int]) -> None:
    reader, at = Reader(data), 0
    for size in sizes:
        if at + size > len(data):
            with pytest.raises(CodecError, match=f"{size} bytes are promised, {len(data) - at} are there"):
                reader.take(size)
            break
        assert bytes(reader.take(size)) == data[at : at + size]
        at += size
    assert reader.left == len(data) - at
    if reader.left:
        with pytest.raises(CodecError, match=f"{reader.left} bytes too many"):
            reader.end()
    else:
        reader.end()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.uint8])
def test_arrays_of_a_reader_are_its_own_and_may_be_changed(dtype: torch.dtype) -> None:
    x = torch.arange(5).to(dtype)
    data = b"\0" + bytes(raw(x))  # not aligned
    reader = Reader(data)
    reader.take(1)
    got = reader.array(dtype, 5)
    assert torch.equal(got, x) and got.dtype == dtype
    got.zero_()
    assert data[1:] == bytes(raw(x)) and len(reader.array(dtype, 0)) == 0
    with pytest.raises(CodecError, match="ends early"):
        reader.array(dtype, 1 << 50)
