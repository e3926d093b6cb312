"""Zstandard, and frames that are not what a sender makes."""

from __future__ import annotations

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hanse.codecs import Codec, Sending, zstd
from hanse.codecs.wire import frame
from hanse.core.errors import CodecError
from hanse.core.layout import Layout


@given(st.binary(max_size=500), st.sampled_from([-7, -1, 1, 3, 19, 22]))
def test_what_is_squeezed_is_restored(data: bytes, level: int) -> None:
    coded = zstd(level).squeeze(data)
    assert zstd().restore(coded, len(data)) == data
    if data:
        with pytest.raises(CodecError, match=f"{len(data)} bytes are promised, at most {len(data) - 1} are allowed"):
            zstd().restore(coded, len(data) - 1)


def compressor(**parameters: int) -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters.from_level(3, **parameters))


HELLO = zstd().squeeze(b"hello" * 100)
BAD = {
    "nothing": b"",
    "not zstandard": b"hello, this is no frame at all",
    "cut short": HELLO[:-1],
    "something after it": HELLO + b"\0",
    "two frames": HELLO + HELLO,
    "no size": compressor(write_content_size=0).compress(b"hello" * 100),
    "a skippable frame": (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc",
    "something after nothing": zstd().squeeze(b"") + b"more",
    "nothing twice": zstd().squeeze(b"") * 2,
    "nothing, cut short": zstd().squeeze(b"")[:-1],
}


@pytest.mark.parametrize("what", BAD)
def test_what_no_sender_makes_is_refused(what: str) -> None:
    with pytest.raises(CodecError, match="zstd"):
        zstd().restore(BAD[what], 10_000)


def test_a_frame_that_says_less_than_it_holds_is_refused() -> None:
    """A gigabyte of zeros in a few kilobytes whose header promises 500 bytes."""
    bomb = bytearray(compressor().compress(bytes(500)))
    bomb[4:] = bomb[4:6] + compressor(write_content_size=0).compress(bytes(1 << 24))[6:]
    with pytest.raises(CodecError):
        zstd().restore(bytes(bomb), 10_000)


def test_a_message_that_expands_too_far_is_refused_before_it_does() -> None:
    codec = Codec.parse("topk(0.1) | zstd")
    bomb = frame(torch.zeros(10), [zstandard.compress(bytes(1 << 26))])
    with pytest.raises(CodecError, match="67108864 bytes are promised, at most"):
        codec.decode(bomb)


@pytest.mark.parametrize("text", ["kmeans(256)", "kmeans(256) | huffman", "topk(1.0) | kmeans(256) | bitmap(grouped=True)", "sign"])
@pytest.mark.parametrize("layered", ["layers | ", ""])
def test_what_a_sender_makes_of_tiny_layers_is_not_refused(layered: str, text: str) -> None:
    layout = Layout({"one": (), "none": (0,), "two": (2,), **{f"{i}": () for i in range(5)}})
    codec, x = Codec.parse(f"{layered}{text} | zstd"), torch.randn(layout.size)
    got = codec.decode(codec.encode(x, Sending.of(x, layout)), layout)
    without: Tensor = Codec.parse(layered + text).roundtrip(x[None].clone(), Sending.of(x, layout)).values[0]
    assert torch.equal(got, without)


def test_many_equal_numbers_take_few_bytes() -> None:
    assert len(Codec.parse("cast | zstd").encode(torch.ones(100_000))) < 100
