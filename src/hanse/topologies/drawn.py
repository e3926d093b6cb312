"""Topologies that are drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Annotated, ClassVar

import networkx as nx
import numpy as np
from pydantic import Field, PositiveInt

from hanse.core.streams import Streams
from hanse.topologies.base import Topology

DRAWS = 100
"""How many graphs are drawn, at most, until one is connected."""


def first_connected(draw: Callable[[], nx.Graph]) -> nx.Graph | None:
    """The first connected graph of ``DRAWS``, if there is one."""
    graphs = (draw() for _ in repeat(None, DRAWS))
    return next((graph for graph in graphs if nx.is_connected(graph)), None)


def regular(degree: int, nodes: int, rng: np.random.Generator) -> nx.Graph:
    """A graph in which every node has ``degree`` neighbours; not always connected."""
    # networkx pairs ends of edges until all fit, which takes for ever near the complete graph; what is missing is regular, too.
    if 2 * degree > nodes - 1:
        return nx.complement(nx.random_regular_graph(nodes - 1 - degree, nodes, rng))
    return nx.random_regular_graph(degree, nodes, rng)


class random_regular(Topology):
    """Every node has the same number of neighbours, otherwise at random; drawn until it is connected."""

    degree: Annotated[int, Field(ge=3)] = 4
    """Neighbours of every node, fewer than there are nodes; the product of both is even. Two would make rings."""

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        if self.degree >= nodes or self.degree * nodes % 2:
            raise self.refused("degree", f"fewer than the number of nodes, {nodes}, and an even product of both")
        rng = streams.numpy("topology.random_regular")
        graph = first_connected(lambda: regular(self.degree, nodes, rng))
        assert graph is not None  # less than one in a hundred is in parts, at any number of nodes
        return graph


class random_neighbours(Topology):
    """Every node has ``k`` neighbours, drawn anew in every round: a random regular graph, connected or not.

    Each node drawing its own neighbours would not be symmetric, and mixing would move the mean.
    """

    varying: ClassVar[bool] = True
    k: PositiveInt = 4
    """Neighbours of every node in a round, fewer than there are nodes; the product of both is even."""

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        if self.k >= nodes or self.k * nodes % 2:
            raise self.refused("k", f"fewer than the number of nodes, {nodes}, and an even product of both")
        return regular(self.k, nodes, streams.numpy("topology.random_neighbours", round=round))


class erdos_renyi(Topology):
    """G(N, p): each pair of nodes is joined with probability p = degree / (N - 1); drawn until it is connected.

    Raises ``ConfigError`` when none of 100 graphs is; a degree above ln N mostly suffices.
    """

    degree: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    """Expected neighbours of a node, fewer than there are nodes."""

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        if self.degree > nodes - 1:
            raise self.refused("degree", f"fewer than the number of nodes, {nodes}")
        rng = streams.numpy("topology.erdos_renyi")
        graph = first_connected(lambda: nx.fast_gnp_random_graph(nodes, self.degree / (nodes - 1), rng))
        if graph is None:
            raise self.refused("degree", f"well above ln {nodes}: none of {DRAWS} graphs is connected")
        return graph


class scale_free(Topology):
    """Nodes come one after another and join earlier ones, the likelier the more neighbours those have (Barabasi, Albert, 1999)."""

    edges: PositiveInt = 2
    """Nodes that each new one joins, fewer than there are nodes."""

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        if self.edges >= nodes:
            raise self.refused("edges", f"fewer than the number of nodes, {nodes}")
        return nx.barabasi_albert_graph(nodes, self.edges, streams.numpy("topology.scale_free"))
