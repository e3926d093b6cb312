"""Each topology is the graph it says, for every number of nodes that it allows."""

from __future__ import annotations

import math
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.core.errors import ConfigError
from hanse.core.streams import Streams
from hanse.topologies import (
    Topology,
    complete,
    erdos_renyi,
    exponential,
    file,
    one_peer_exponential,
    random_neighbours,
    random_regular,
    ring,
    scale_free,
    star,
    torus,
)

STREAMS = Streams(3)
EVERY = [
    ring(4),
    torus(),
    exponential(),
    one_peer_exponential(),
    star(),
    complete(),
    random_regular(3),
    random_neighbours(3),
    erdos_renyi(6),
    scale_free(),
]
DRAWN = [random_regular(3), random_neighbours(3), erdos_renyi(6), scale_free()]


def drawn(topology: Topology, nodes: int = 16, seed: int = 3, round: int = 0) -> set[frozenset[int]]:
    return {frozenset(edge) for edge in topology.graph(nodes, Streams(seed), round).edges}


def degrees(topology: Topology, nodes: int, round: int = 0) -> list[int]:
    return [degree for _, degree in sorted(topology.graph(nodes, STREAMS, round).degree)]


@pytest.mark.parametrize("topology", EVERY, ids=str)
def test_nodes_are_numbered_and_no_edge_is_a_loop(topology: Topology) -> None:
    graph = topology.graph(20, STREAMS, 2)
    assert sorted(graph) == list(range(20)) and not graph.is_directed() and not graph.is_multigraph()
    assert nx.number_of_selfloops(graph) == 0
    assert topology.varying or nx.is_connected(graph)


@pytest.mark.parametrize("topology", EVERY, ids=str)
def test_only_varying_ones_know_the_round(topology: Topology) -> None:
    assert drawn(topology, round=5) == drawn(topology, round=5)
    assert (drawn(topology, round=5) != drawn(topology, round=6)) == topology.varying


@pytest.mark.parametrize("topology", DRAWN, ids=str)
def test_another_seed_is_another_graph(topology: Topology) -> None:
    assert drawn(topology, seed=1) != drawn(topology, seed=2)


def test_ring() -> None:
    assert drawn(ring(4), 7) == {frozenset((i, (i + d) % 7)) for i in range(7) for d in (1, 2)}


def test_torus_is_as_square_as_it_can() -> None:
    assert nx.is_isomorphic(torus().graph(12, STREAMS, 0), nx.cartesian_product(nx.cycle_graph(3), nx.cycle_graph(4)))
    assert set(torus().graph(12, STREAMS, 0)[5]) == {4, 6, 1, 9}  # row 1, column 1 of 3 x 4
    assert degrees(torus(), 16) == [4] * 16 and degrees(torus(), 10) == [3] * 10


@given(st.integers(1, 70))
def test_exponential_joins_powers_of_two_apart(nodes: int) -> None:
    apart = {i for i in range(1, nodes) if i.bit_count() == 1 or (nodes - i).bit_count() == 1}
    graph = exponential().graph(nodes, STREAMS, 0)
    assert all(set(graph[i]) == {(i + d) % nodes for d in apart} for i in range(nodes))


@given(st.integers(1, 70), st.integers(0, 100))
def test_one_partner_at_a_time_and_everybody_in_a_period(nodes: int, first: int) -> None:
    period = max(1, math.ceil(math.log2(nodes)))
    graphs = [one_peer_exponential().graph(nodes, STREAMS, first + t) for t in range(period)]
    assert all(max(degree for _, degree in graph.degree) <= 1 for graph in graphs)
    assert nx.is_connected(nx.compose_all(graphs))


@given(st.integers(4, 24), st.integers(3, 23), st.integers(0, 9))
def test_random_regular_and_random_neighbours_are_regular(nodes: int, degree: int, round: int) -> None:
    if degree >= nodes or degree * nodes % 2:
        with pytest.raises(ConfigError, match=rf"random_regular.degree: {degree} is not allowed: .* {nodes}, and an even"):
            random_regular(degree).graph(nodes, STREAMS, round)
        with pytest.raises(ConfigError, match=rf"random_neighbours.k: {degree} is not allowed: .* {nodes}, and an even"):
            random_neighbours(degree).graph(nodes, STREAMS, round)
    else:
        assert degrees(random_regular(degree), nodes, round) == [degree] * nodes
        assert degrees(random_neighbours(degree), nodes, round) == [degree] * nodes


def test_random_neighbours_may_be_a_matching() -> None:
    assert degrees(random_neighbours(1), 10, round=4) == [1] * 10


def test_erdos_renyi_has_the_degree_it_says() -> None:
    """200 nodes of 20 neighbours on average: 2,000 edges, with a deviation of 42."""
    assert abs(len(drawn(erdos_renyi(20), 200)) - 2000) < 3 * 42
    assert degrees(erdos_renyi(9), 10) == [9] * 10


def test_scale_free_has_few_nodes_of_many_neighbours() -> None:
    found = sorted(degrees(scale_free(2), 400))
    assert sum(found) == 2 * 2 * (400 - 2) and found[200] <= 3 and found[-1] >= 25


def test_star_and_complete() -> None:
    assert degrees(star(), 6) == [5, 1, 1, 1, 1, 1] and degrees(complete(), 6) == [5] * 6


@pytest.mark.parametrize("topology", [star(), complete(), exponential(), one_peer_exponential()], ids=str)
def test_a_node_may_be_alone(topology: Topology) -> None:
    assert sorted(topology.graph(1, STREAMS, 0)) == [0] and drawn(topology, 1) == set()


@pytest.mark.parametrize(
    ("text", "nodes", "message"),
    [
        ("ring(4)", 4, "ring.neighbours: 4 is not allowed: fewer than the number of nodes, 4"),
        ("torus", 13, "torus: 13 nodes are not allowed: rows times columns, at least two of each; use ring"),
        ("erdos_renyi(9.5)", 10, "erdos_renyi.degree: 9.5 is not allowed: fewer than the number of nodes, 10"),
        ("erdos_renyi(0.5)", 50, "erdos_renyi.degree: 0.5 is not allowed: well above ln 50: none of 100 graphs is connected"),
        ("scale_free(3)", 3, "scale_free.edges: 3 is not allowed: fewer than the number of nodes, 3"),
    ],
)
def test_what_does_not_fit_the_nodes_is_refused(text: str, nodes: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Topology.parse(text).graph(nodes, STREAMS, 0)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text", ["ring(3)", "ring(0)", "random_regular(2)", "random_neighbours(0)", "erdos_renyi(0)", "scale_free(0)"]
)
def test_what_never_fits_is_refused_at_once(text: str) -> None:
    name, value = text.rstrip(")").split("(")
    with pytest.raises(ConfigError, match=rf"{name}\.\w+: {value}"):
        Topology.parse(text)


def test_a_file_of_edges(tmp_path: Path) -> None:
    (tmp_path / "edges.txt").write_text("# from, to\n0 1\n\n1 2 0.5  # with a weight\n2 0\n3 1\n1 3\n")
    graph = file(str(tmp_path / "edges.txt")).graph(4, STREAMS, 0)
    assert {frozenset(edge) for edge in graph.edges} == {frozenset(pair) for pair in ((0, 1), (1, 2), (0, 2), (1, 3))}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (b"0 1\n1 two\n", "a list of edges, two numbers on a line .*two to type"),
        (b"0 1\n2\n1 2\n", "a list of edges, two numbers on a line .line 2."),
        (b"\xff\xfe\x00", "a list of edges, two numbers on a line .*decode"),
        (b"0 1\n1 2\n2 3\n", r"nodes 0 to 2 .it names 3."),
        (b"0 1\n1 2\n-1 2\n", r"nodes 0 to 2 .it names -1."),
        (b"0 1\n1 2\n2 2\n", r"edges between two nodes .it joins 2 to itself."),
        (b"0 1\n", r"a connected graph of 3 nodes .it has 2 parts."),
        (b"", r"a connected graph of 3 nodes .it has 3 parts."),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: bytes, allowed: str) -> None:
    path = tmp_path / "edges.txt"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=rf"file.path: '.*edges.txt' is not allowed: {allowed}"):
        file(str(path)).graph(3, STREAMS, 0)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"file.path: .* is not allowed: a list of edges.*No such file"):
        file(str(tmp_path / "none")).graph(3, STREAMS, 0)
