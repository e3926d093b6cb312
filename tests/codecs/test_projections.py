"""A few coordinates and a seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hanse.codecs import Codec, Sending, projections
from hanse.codecs.chain import Load
from hanse.codecs.projections import PIECE
from hanse.codecs.wire import FRAME
from hanse.core.layout import Layout


def through(codec: Codec, x: Tensor, seed: int = 0) -> Tensor:
    return codec.decode(codec.encode(x, Sending.of(x, seed=seed)))


def directions(n: int, count: int, seed: int) -> Tensor:
    """D ``[n, count]``."""
    load = Load("", (n,), n, torch.zeros(1, count), seeds=torch.tensor([seed]))
    return torch.cat([d[0] for _, d in projections(count)._directions(load, torch.float64)])


@pytest.mark.parametrize("n", [17, 1000, 100_000])
def test_a_message_is_a_seed_and_the_coordinates(n: int) -> None:
    assert len(projections(16).encode(torch.randn(n))) == FRAME.size + 1 + 8 + 16 * 4


@given(st.integers(1, 400), st.integers(1, 70), st.integers(-(2**63), 2**63 - 1))
def test_what_arrives_is_the_projection_on_the_span(n: int, count: int, seed: int) -> None:
    """What is left is orthogonal to every direction, and never longer than the vector."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    got = through(projections(count), x, seed)
    if n <= count:
        assert torch.equal(got, x)
        return
    d = directions(n, count, seed)
    assert bool((d.abs() == 1).all())
    wanted = d @ torch.linalg.lstsq(d, x[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert float((d.T @ (x - got)).abs().max()) < 1e-5 * n and float((x - got).norm()) <= float(x.norm()) * (1 + 1e-12)


def test_a_vector_in_the_span_arrives_as_it_is() -> None:
    x = directions(5 * PIECE + 3, 4, 7) @ torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(through(projections(4), x, 7), x, rtol=0, atol=1e-6)


def test_in_the_mean_over_seeds_it_is_count_nths_of_the_vector() -> None:
    n, count, draws = 40, 8, 6000
    x = torch.linspace(-1, 1, n)
    got = (
        projections(count).roundtrip(x.expand(draws, -1).clone(), Sending(Layout({"": (n,)}), torch.arange(draws))).values.double()
    )
    error = (got.mean(0) - count / n * x) / (got.std(0) / draws**0.5)
    assert error.abs().max() < 5
    assert abs(float(got.square().sum(1).mean() / x.square().sum()) - count / n) < 0.01


def test_directions_of_seeds_layers_and_pieces_differ() -> None:
    d = directions(2 * PIECE, 40, 1)
    assert (d.T @ d / len(d) - torch.eye(40)).abs().max() < 0.06
    assert not torch.equal(d[:PIECE], d[PIECE:]) and not torch.equal(d, directions(2 * PIECE, 40, 2))
    layout = Layout({"a": (100,), "b": (100,)})
    x = torch.ones(200)
    codec = Codec.parse("layers | projections(3)")
    a, b = layout.views(codec.decode(codec.encode(x, Sending.of(x, layout)), layout)).values()
    assert not torch.equal(a, b)


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 5), st.sampled_from(["", " | uniform(8)", " | cast | zstd"]))
def test_alone_it_is_bit_for_bit_what_it_is_beside_others(n: int, count: int, clients: int, after: str) -> None:
    layout = Layout({"w": (n, 9), "b": (n,)})
    x = torch.randn(clients, layout.size, generator=torch.Generator().manual_seed(n))
    for text in (f"layers | projections({count}){after}", f"projections({count}){after}"):
        codec, seeds = Codec.parse(text), torch.arange(clients) * 2**40
        sent = codec.roundtrip(x.clone(), Sending(layout, seeds))
        for row, s, got, size in zip(x, seeds, sent.values, sent.sizes.tolist(), strict=True):
            data = codec.encode(row, Sending(layout, s[None]))
            assert torch.equal(codec.decode(data, layout), got) and len(data) == size


def test_several_pieces_are_the_same_alone_and_beside_others() -> None:
    n = 3 * PIECE + 5
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    sent = projections(33).roundtrip(x.clone(), Sending(Layout({"": (n,)}), torch.arange(3)))
    assert all(torch.equal(through(projections(33), row, i), sent.values[i]) for i, row in enumerate(x))
