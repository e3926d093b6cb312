"""The matrix of gossip: doubly stochastic, as fast as its spectrum says, and equal to the dense product."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hanse.core.errors import ConfigError
from hanse.core.streams import Streams
from hanse.topologies import (
    Mixing,
    complete,
    exponential,
    mixing,
    one_peer_exponential,
    random_regular,
    ring,
    scale_free,
    star,
    torus,
)

STREAMS = Streams(0)
FIXED = [ring(), torus(), exponential(), random_regular(), scale_free(), star(), complete()]


@st.composite
def graphs(draw: st.DrawFn) -> nx.Graph:
    """Any graph of up to 12 nodes, connected or not."""
    nodes = draw(st.integers(1, 12))
    graph = nx.empty_graph(nodes)
    pairs = [(i, j) for i in range(nodes) for j in range(i)]
    graph.add_edges_from(draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else [])
    return graph


def rows(nodes: int, size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(nodes, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def metropolis(topology: object, nodes: int) -> Mixing:
    return Mixing.metropolis(topology.graph(nodes, STREAMS, 0))  # type: ignore[attr-defined]


def spread(x: Tensor) -> float:
    """Xi, the mean squared distance from the mean."""
    return float((x - x.mean(0)).square().sum(1).mean())


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---- weights


@given(graphs())
def test_metropolis_is_symmetric_and_doubly_stochastic(graph: nx.Graph) -> None:
    w = Mixing.metropolis(graph).matrix()
    one = torch.ones(len(w), dtype=torch.float64)
    assert torch.equal(w, w.T) and bool((w.diagonal() > 0).all())
    close(w.sum(0), one)
    close(w.sum(1), one)
    degree = dict(graph.degree)
    for i, j in ((i, j) for i in graph for j in graph if i != j):
        assert w[i, j] == pytest.approx(1 / (1 + max(degree[i], degree[j])) if graph.has_edge(i, j) else 0, abs=0)


@given(graphs(), st.floats(0, 0.99))
def test_leaning_keeps_its_share_and_the_neighbours_the_rest(graph: nx.Graph, own: float) -> None:
    w = Mixing.leaning(graph, own=own).matrix()
    for i in graph:
        others = list(graph[i])
        assert float(w[i, i]) == (own if others else 1)
        assert all(float(w[i, j]) == pytest.approx((1 - own) / len(others)) for j in others)
        assert float(w[i].sum()) == pytest.approx(1)


def test_leaning_wholly_on_oneself_is_refused() -> None:
    for own in (1.0, -0.1, math.nan):
        with pytest.raises(ConfigError, match=r"own: .* is not allowed: at least 0 and less than 1"):
            Mixing.leaning(nx.path_graph(3), own=own)


def test_a_row_has_its_neighbours_in_order() -> None:
    found = Mixing.metropolis(nx.Graph([(2, 0), (1, 0), (3, 2)]))
    assert found.offsets.tolist() == [0, 2, 3, 5, 6] and found.neighbours.tolist() == [1, 2, 0, 0, 3, 2]
    assert found.degrees.tolist() == [2, 1, 2, 1] and found.receivers.tolist() == [0, 0, 1, 2, 2, 3]
    close(found.weights * 3, torch.ones(6, dtype=torch.float64))
    close(found.own * 3, torch.tensor([1.0, 2, 1, 2], dtype=torch.float64))


@given(graphs(), st.data())
def test_who_is_away_keeps_its_model_and_the_rest_stays_doubly_stochastic(graph: nx.Graph, data: st.DataObject) -> None:
    away = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(graph), max_size=len(graph))))
    before = Mixing.metropolis(graph)
    after = before.without(away)
    w, old = after.matrix(), before.matrix()
    assert torch.equal(w, w.T)
    close(w.sum(1), torch.ones(len(w), dtype=torch.float64))
    assert torch.equal(w[away], torch.eye(len(w), dtype=torch.float64)[away])
    both = ~away[:, None] & ~away & ~torch.eye(len(w), dtype=torch.bool)
    assert torch.equal(w[both], old[both])  # all that is missing is on the diagonal
    assert after.degrees.tolist() == [sum(not away[j] for j in graph[i]) * (not away[i]) for i in range(len(graph))]


def test_rows_of_leaning_still_sum_to_one_without_some() -> None:
    found = Mixing.leaning(nx.star_graph(4), own=0.25).without(torch.tensor([False, True, False, True, False]))
    close(found.matrix().sum(1), torch.ones(5, dtype=torch.float64))
    assert found.own.tolist() == [0.25 + 2 * 0.75 / 4, 1, 0.25, 1, 0.25]


# ---- products


@given(graphs(), st.sampled_from([torch.float32, torch.float64]))
def test_mix_is_the_dense_product(graph: nx.Graph, dtype: torch.dtype) -> None:
    x, sent, atol = rows(len(graph), 5, dtype), rows(len(graph), 5, dtype, seed=1), 1e-6 if dtype == torch.float32 else 1e-12
    for found in (Mixing.metropolis(graph), Mixing.leaning(graph, own=0.3)):
        w = found.matrix()
        others = w - torch.diag(w.diagonal())
        close(found.mix(x).double(), w @ x.double(), atol)
        close(found.mix(x, sent).double(), w.diagonal()[:, None] * x.double() + others @ sent.double(), atol)


@pytest.mark.parametrize("topology", FIXED, ids=str)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_every_way_to_multiply_is_the_dense_product(topology: object, dtype: torch.dtype, atol: float) -> None:
    """Many nodes (sparse), many columns (in pieces), the complete graph (through the sum), twice the same bits."""
    found, x = metropolis(topology, 100), rows(100, 1100, dtype)
    before = mixing.CHUNK
    try:
        mixing.CHUNK = 1  # pieces of 512 columns, the last one shorter
        got = found.mix(x)
        assert torch.equal(got, found.mix(x))
    finally:
        mixing.CHUNK = before
    close(got.double(), found.matrix() @ x.double(), atol)
    close(found.mix(x).double(), found.matrix() @ x.double(), atol)
    some = found.without(torch.arange(100) % 7 == 0)  # what is left of the complete graph is dense
    close(some.mix(x).double(), some.matrix() @ x.double(), atol)
    assert torch.equal(x, rows(100, 1100, dtype))


def test_one_step_on_the_complete_graph_makes_all_equal_to_the_mean() -> None:
    x = rows(30, 40)
    close(metropolis(complete(), 30).mix(x), x.mean(0).expand(30, 40))


def test_one_partner_a_round_makes_all_equal_to_the_mean_in_log_n_rounds() -> None:
    x = start = rows(16, 8)
    for t in range(7, 11):
        x = Mixing.metropolis(one_peer_exponential().graph(16, STREAMS, t)).mix(x)
    close(x, start.mean(0).expand(16, 8))


@given(graphs())
def test_average_is_the_mean_of_what_arrives(graph: nx.Graph) -> None:
    sent = rows(len(graph), 4)
    w = Mixing.metropolis(graph).matrix().fill_diagonal_(0)
    lonely = torch.tensor([not graph[i] for i in range(len(graph))])
    expected = torch.where(lonely[:, None], 0.0, w @ sent / w.sum(1, keepdim=True))
    close(Mixing.metropolis(graph).average(sent), expected)
    equal = [sent[list(graph[i])].mean(0) for i in range(len(graph)) if graph[i]]
    if equal:
        close(Mixing.leaning(graph, own=0.5).average(sent)[~lonely], torch.stack(equal))


@pytest.mark.parametrize("topology", FIXED, ids=str)
def test_mixing_keeps_the_mean(topology: object) -> None:
    found, x = metropolis(topology, 24), rows(24, 50)
    mean = x.mean(0)
    for _ in range(20):
        x = found.mix(x)
    close(x.mean(0), mean)


# ---- the spectrum


@pytest.mark.parametrize("topology", FIXED, ids=str)
def test_consensus_is_as_fast_as_lambda(topology: object) -> None:
    """Q steps: Xi <= lambda^(2Q) Xi, with equality for the eigenvector of lambda."""
    found, x, steps = metropolis(topology, 16), rows(16, 30), 4
    values, vectors = np.linalg.eigh(found.matrix().numpy())
    others = np.delete(np.arange(16), np.argmax(values))
    slowest = torch.from_numpy(vectors[:, others[np.argmax(np.abs(values[others]))]])[:, None].clone()
    for start in (x, slowest):
        mixed = start
        for _ in range(steps):
            mixed = found.mix(mixed)
        bound = found.second ** (2 * steps) * spread(start)
        assert spread(mixed) <= bound + 1e-12
    assert spread(mixed) == pytest.approx(bound, abs=1e-12)


def ring_lambda(n: int) -> float:
    return (1 + 2 * math.cos(2 * math.pi / n)) / 3


@pytest.mark.parametrize(
    ("topology", "nodes", "second"),
    [
        (ring(), 16, ring_lambda(16)),
        (ring(), 3, 0.0),
        (ring(4), 16, (1 + 2 * math.cos(math.pi / 8) + 2 * math.cos(math.pi / 4)) / 5),
        (torus(), 16, 3 / 5),
        (torus(), 12, (1 + 2 + 2 * math.cos(2 * math.pi / 4)) / 5),
        (exponential(), 8, 1 - 2 / 3),
        (exponential(), 16, 1 - 2 / 4),
        (exponential(), 1024, 1 - 2 / 10),
        (star(), 10, 9 / 10),
        (complete(), 10, 0.0),
        (complete(), 1, 0.0),
    ],
    ids=str,
)
def test_lambda_by_formula(topology: object, nodes: int, second: float) -> None:
    found = metropolis(topology, nodes)
    assert found.second == pytest.approx(second, abs=1e-12)
    assert found.gap == pytest.approx(1 - second, abs=1e-12)


def test_ring_of_sixteen() -> None:
    assert round(metropolis(ring(), 16).second, 4) == 0.9493


@given(st.integers(4, 64))
def test_lambda_of_the_exponential_graph(nodes: int) -> None:
    """A circulant matrix has the eigenvalues ``(1 + sum_d cos(2 pi k d / N)) / (1 + degree)``, d over the neighbours of node 0."""
    apart = sorted({i for j in range(nodes.bit_length()) if 1 << j < nodes for i in (1 << j, nodes - (1 << j))})
    values = [(1 + sum(math.cos(2 * math.pi * k * d / nodes) for d in apart)) / (1 + len(apart)) for k in range(1, nodes)]
    assert metropolis(exponential(), nodes).second == pytest.approx(max(map(abs, values)), abs=1e-12)


def test_a_graph_in_two_parts_has_no_gap() -> None:
    assert Mixing.metropolis(nx.empty_graph(2)).second == 1.0
    assert Mixing.metropolis(nx.disjoint_union(nx.cycle_graph(4), nx.cycle_graph(5))).gap == pytest.approx(0, abs=1e-12)


def test_lanczos_finds_what_the_dense_matrix_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for topology in (random_regular(), scale_free(), star(), torus()):
        dense = metropolis(topology, 60).second
        with monkeypatch.context() as patch:
            patch.setattr(mixing, "DENSE", 10)
            assert metropolis(topology, 60).second == pytest.approx(dense, abs=1e-9)
    with monkeypatch.context() as patch:  # -1/9, not 1/9: the other end of the spectrum decides
        patch.setattr(mixing, "DENSE", 5)
        assert Mixing.leaning(nx.complete_graph(10), own=0.0).second == pytest.approx(1 / 9, abs=1e-9)


@given(graphs(), st.floats(0, 0.99))
def test_lambda_of_a_matrix_that_is_not_symmetric(graph: nx.Graph, own: float) -> None:
    """The second largest modulus of the eigenvalues of W itself."""
    found = Mixing.leaning(graph, own=own)
    values = sorted(np.abs(np.linalg.eigvals(found.matrix().numpy())))
    assert found.second == pytest.approx(values[-2] if len(values) > 1 else 0, abs=1e-6)
