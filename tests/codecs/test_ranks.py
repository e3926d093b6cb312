"""Permutations in as few bits as their numbers need."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanse.codecs import Codec, Sending, ranks
from hanse.codecs.ranks import BLOCK, reputations
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
    assert not torch.equal(ranks().decode(ranks().encode(x[0])), x[0])  # as one vector it is ranked as one


@given(st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=20))
def test_of_any_other_vector_the_order_arrives(row: list[float]) -> None:
    x = torch.tensor(row)
    got = ranks().decode(ranks().encode(x))
    assert got.tolist() == [sum(y < x or (y == x and j < i) for j, y in enumerate(row)) for i, x in enumerate(row)]
    sent = ranks().roundtrip(torch.stack([x, -x]), Sending(Layout({"": (len(row),)}), torch.arange(2)))
    assert torch.equal(sent.values[0], got) and torch.equal(sent.values[1], reputations(-x).float())


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_the_order_is_the_argsort_of_the_argsort_in_blocks_of_any_number(n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    assert torch.equal(ranks().decode(ranks().encode(x)), x.argsort().argsort().float())


def test_what_is_not_finite_has_a_place_too() -> None:
    """A liar's message is a valid vote whatever the lie: what is not a number is the highest."""
    row = torch.tensor([math.nan, 1.0, math.inf, -math.inf, math.nan])
    assert ranks().decode(ranks().encode(row)).tolist() == [3, 1, 2, 0, 4]
    sent = ranks().roundtrip(torch.stack([row, -row]), Sending(Layout({"": (5,)}), torch.arange(2)))
    assert sent.values.tolist() == [[3, 1, 2, 0, 4], [3, 1, 0, 2, 4]]
    assert sent.sizes.tolist() == [len(ranks().encode(row))] * 2


@pytest.mark.parametrize("text", ["topk(0.5) | ranks", "topk(1.0) | ranks", "projections(2) | ranks"])
def test_a_selection_is_no_ranking(text: str) -> None:
    with pytest.raises(CodecError, match="all 10 entries are needed"):
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
