"""Permutations in as few bits as their numbers need."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanse.codecs import Codec, Sending, ranks
from hanse.codecs.wire import FRAME, frame, varint
from hanse.core.errors import CodecError
from hanse.core.layout import Layout


def permutation(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).float()


@given(
    st.permutations(range(20)), st.integers(1, 20), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
)
def test_a_permutation_arrives_as_it_is(order: list[int], n: int, dtype: torch.dtype) -> None:
    x = torch.tensor([i for i in order if i < n], dtype=dtype)
    got = ranks().decode(ranks().encode(x))
    assert got.dtype == dtype and torch.equal(got, x)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 255, 256, 257, 1000, 100_000])
def test_an_entry_takes_as_many_bits_as_the_last_one_needs(n: int) -> None:
    x, size = permutation(n), math.ceil(n * math.ceil(math.log2(n)) / 8)
    data = ranks().encode(x)
    assert len(data) == FRAME.size + len(varint(size + 1)) + size and torch.equal(ranks().decode(data), x)


def test_the_bits_are_the_numbers_lowest_first() -> None:
    data = ranks().encode(torch.tensor([2.0, 0, 1, 3, 4]))
    wanted = "010" + "000" + "100" + "110" + "001" + "0"
    assert data[FRAME.size :] == bytes([3, int(wanted[:8][::-1], 2), int(wanted[8:][::-1], 2)])


def test_layers_are_ranked_by_themselves() -> None:
    layout = Layout({"a": (4, 5), "b": (), "none": (0, 2), "c": (7,)})
    x = torch.stack([torch.cat([permutation(size, seed) for size in layout.sizes]) for seed in range(3)])
    for text in ("layers | ranks", "layers | ranks | zstd", "layers | ranks | huffman"):
        codec = Codec.parse(text)
        sent = codec.roundtrip(x.clone(), Sending(layout, torch.arange(3)))
        assert torch.equal(sent.values, x)
        data = [codec.encode(row, Sending.of(row, layout)) for row in x]
        assert all(torch.equal(codec.decode(d, layout), row) for d, row in zip(data, x, strict=True))
        assert sent.sizes.tolist() == [len(d) for d in data]
    with pytest.raises(CodecError, match="not a permutation of 0 to 27"):
        ranks().encode(x[0])


@pytest.mark.parametrize(
    "row", [[0, 1, 1], [1, 2, 3], [0, 1, 2.5], [0, -1, 2], [0, 1, math.nan], [0, 1, math.inf], [0, 1, 1e30]], ids=str
)
def test_what_is_no_permutation_is_refused(row: list[float]) -> None:
    with pytest.raises(CodecError, match="not a permutation of 0 to 2"):
        ranks().encode(torch.tensor(row, dtype=torch.float64))
    with pytest.raises(CodecError):
        ranks().roundtrip(torch.tensor([[2.0, 1, 0], row], dtype=torch.float64), Sending(Layout({"": (3,)}), torch.arange(2)))


@pytest.mark.parametrize("text", ["topk(0.5) | ranks", "topk(1.0) | ranks", "projections(2) | ranks"])
def test_a_selection_is_no_ranking(text: str) -> None:
    with pytest.raises(CodecError, match="permutation"):
        Codec.parse(text).encode(permutation(10))


@pytest.mark.parametrize(
    "body",
    [
        varint(2 + 1) + bytes([0, 0]),
        varint(2 + 1) + bytes([0xFF, 0xFF]),
        varint(2 + 1) + bytes([0b10_000_000 | 0b001_000, 0b0_100_011 | 128]),
        varint(1 + 1) + bytes([0]),
        varint(0) + torch.tensor([4.0, 3, 2, 1, 1e9]).numpy().tobytes(),
        varint(3 + 1) + bytes([0, 0, 0]),
        ranks().encode(torch.arange(5.0))[FRAME.size : -1],
    ],
    ids=["the same number twice", "numbers too large", "a bit too many", "too short", "five floats", "too long", "cut short"],
)
def test_what_no_sender_makes_is_refused(body: bytes) -> None:
    with pytest.raises(CodecError):
        ranks().decode(frame(torch.zeros(5), [body]))
