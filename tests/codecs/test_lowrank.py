"""Matrices as two thin ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hanse.codecs import Codec, Sending
from hanse.codecs.lowrank import folded
from hanse.codecs.wire import FRAME
from hanse.core.errors import ConfigError
from hanse.core.layout import Layout


def one(*shape: int) -> Layout:
    return Layout({"w": shape})


def through(text: str, x: Tensor, layout: Layout, seed: int = 0) -> Tensor:
    codec = Codec.parse(text)
    return codec.decode(codec.encode(x.flatten(), Sending.of(x, layout, seed)), layout).view(x.shape)


def test_the_size_is_that_of_two_thin_matrices() -> None:
    """And of vectors, and of matrices that this would make longer, their own."""
    layout = Layout({"wide": (30, 4, 5), "bias": (30,), "small": (3, 4), "one": ()})
    x = torch.randn(layout.size)
    data = Codec.parse("layers | lowrank(2)").encode(x, Sending.of(x, layout))
    assert len(data) == FRAME.size + (1 + 4 * 2 * (30 + 20)) + (1 + 4 * 30) + (1 + 4 * 12) + (1 + 4)
    got = layout.views(Codec.parse("layers | lowrank(2)").decode(data, layout))
    assert all(torch.equal(got[name], layout.views(x)[name]) for name in ("bias", "small", "one"))
    assert torch.linalg.matrix_rank(got["wide"].view(30, 20)) == 2


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 2**63 - 1))
def test_alone_it_is_bit_for_bit_what_it_is_beside_others(a: int, b: int, rank: int, clients: int, wide: bool, seed: int) -> None:
    layout = Layout({"w": (a, b), "v": (b, 3, 2) if wide else (b,)})
    x = torch.randn(clients, layout.size, generator=torch.Generator().manual_seed(seed % 2**32))
    codec, seeds = Codec.parse(f"layers | lowrank({rank})"), torch.arange(clients) * 7 + seed // 2
    sent = codec.roundtrip(x.clone(), Sending(layout, seeds))
    for row, s, got, size in zip(x, seeds, sent.values, sent.sizes.tolist(), strict=True):
        data = codec.encode(row, Sending(layout, s[None]))
        assert torch.equal(codec.decode(data, layout), got) and len(data) == size


@pytest.mark.parametrize("shape", [(257, 513), (64, 3, 3, 64), (1000, 10), (1500, 3000)])
def test_large_layers_too(shape: tuple[int, ...]) -> None:
    layout = one(*shape)
    x = torch.randn(2 if layout.size > 10**6 else 5, layout.size, generator=torch.Generator().manual_seed(0))
    codec = Codec.parse("layers | lowrank(1)")
    sent = codec.roundtrip(x.clone(), Sending(layout, torch.arange(len(x))))
    i = len(x) - 1
    assert torch.equal(codec.decode(codec.encode(x[i], Sending(layout, torch.tensor([i]))), layout), sent.values[i])


@given(st.integers(4, 20), st.integers(4, 20), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_a_matrix_of_that_rank_arrives_as_it_is(a: int, b: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(a, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, b, generator=generator, dtype=torch.float64
    )
    for more in (0, 2):
        got = through(f"layers | lowrank({rank + more})", x, one(a, b))
        torch.testing.assert_close(got, x, rtol=0, atol=1e-8 * float(x.norm()))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_it_is_a_projection_and_close_to_the_best_one(seed: int, rank: int) -> None:
    """P P^T M is orthogonal to what is left. The best of that rank is the truncated singular value decomposition."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 20, generator=generator, dtype=torch.float64) * 0.5 ** torch.arange(20.0)
    got = through(f"layers | lowrank({rank})", x, one(30, 20))
    assert abs(float((got * (x - got)).sum())) < 1e-10 * float(x.square().sum())
    best = float(torch.linalg.svdvals(x)[rank:].square().sum()) ** 0.5
    assert best * (1 - 1e-9) <= float((x - got).norm()) <= 1.7 * best


def test_what_is_left_out_is_zero_when_nothing_is_there() -> None:
    assert torch.equal(through("layers | lowrank(2)", torch.zeros(10, 10), one(10, 10)), torch.zeros(10, 10))
    x = torch.outer(torch.arange(10.0), torch.ones(10))
    torch.testing.assert_close(through("layers | lowrank(3)", x, one(10, 10)), x, rtol=0, atol=1e-5)


def test_factors_that_overflow_make_the_layer_travel_as_it_is() -> None:
    x = torch.full((20, 20), 3e38)
    assert torch.equal(through("layers | lowrank(1)", x, one(20, 20)), x)


def test_another_seed_is_another_start() -> None:
    x = torch.randn(20, 20)
    first, again, other = (through("layers | lowrank(1)", x, one(20, 20), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("after", ["uniform(8)", "int8(16) | zstd", "cast('float16')", "kmeans(16) | huffman"])
def test_factors_are_quantised_like_anything_else(after: str) -> None:
    layout = Layout({"w": (20, 30), "b": (20,)})
    x = torch.randn(3, layout.size)
    codec = Codec.parse(f"layers | lowrank(2) | {after}")
    sent = codec.roundtrip(x.clone(), Sending(layout, torch.arange(3)))
    for i, row in enumerate(x):
        data = codec.encode(row, Sending(layout, torch.tensor([i])))
        assert torch.equal(codec.decode(data, layout), sent.values[i]) and len(data) == int(sent.sizes[i])


def test_without_layers_there_is_no_matrix() -> None:
    with pytest.raises(ConfigError, match=r"lowrank.* is for matrices, write layers \| lowrank"):
        Codec.parse("lowrank(3) | uniform")
    assert Codec.parse("layers | lowrank(3)").sparse


@given(st.integers(1, 70), st.integers(0, 2))
def test_folding_is_summing(n: int, dim: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = n
    x = torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(n)).double()
    before = x.clone()
    assert torch.equal(folded(x, dim), x.sum(dim)) and torch.equal(x, before)
