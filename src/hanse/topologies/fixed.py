"""Topologies without chance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, ClassVar

import networkx as nx
from pydantic import Field

from hanse.core.errors import ConfigError
from hanse.core.streams import Streams
from hanse.topologies.base import Topology


class ring(Topology):
    """Nodes in a circle, each joined to the nearest on both sides (a ring lattice)."""

    neighbours: Annotated[int, Field(ge=2, multiple_of=2)] = 2
    """Neighbours of every node, half of them on each side; fewer than there are nodes."""

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        if self.neighbours >= nodes:
            raise self.refused("neighbours", f"fewer than the number of nodes, {nodes}")
        return nx.circulant_graph(nodes, range(1, self.neighbours // 2 + 1))


class torus(Topology):
    """A grid that is closed in both directions, as square as the number of nodes allows: node ``row * columns + column``.

    Every node has four neighbours, or three where there are two rows. Raises ``ConfigError`` where there would be one row.
    """

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        rows = max(divisor for divisor in range(1, math.isqrt(nodes) + 1) if nodes % divisor == 0)
        if rows == 1:
            raise ConfigError(f"torus: {nodes} nodes are not allowed: rows times columns, at least two of each; use ring")
        return nx.convert_node_labels_to_integers(nx.grid_2d_graph(rows, nodes // rows, periodic=True))


class exponential(Topology):
    """Nodes in a circle, each joined to those 1, 2, 4, ... steps away, less than once around, in both directions.

    The static exponential graph of Ying, Yuan, Chen, Hu, Pan, Yin: "Exponential Graph is Provably Efficient for Decentralized
    Deep Training", NeurIPS 2021, arXiv 2110.13363, whose edges go one way, made undirected. Where N is a power of two
    and at least 8, the gap under Metropolis weights is ``2 / log2 N``.
    """

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        return nx.circulant_graph(nodes, [1 << j for j in range((nodes - 1).bit_length())])


class one_peer_exponential(Topology):
    """One partner a round: in round t node i talks to node ``i xor 2^(t mod ceil(log2 N))``, and rests if there is none.

    Partners talk in both directions, unlike those of the one-peer graph of Ying et al., arXiv 2110.13363. As there, where N is a
    power of two, ``log2 N`` rounds with weights of one half make all nodes equal to their mean. For other N nodes rest now and
    then; any ``ceil(log2 N)`` rounds together still join all nodes.
    """

    varying: ClassVar[bool] = True

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        apart = 1 << round % max(1, (nodes - 1).bit_length())
        graph = nx.empty_graph(nodes)
        graph.add_edges_from((i, i ^ apart) for i in range(nodes) if i < i ^ apart < nodes)
        return graph


class star(Topology):
    """Node 0 is joined to all others."""

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        return nx.star_graph(nodes - 1)


class complete(Topology):
    """All nodes are joined to all others."""

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        return nx.complete_graph(nodes)


class file(Topology):
    """A graph from a text file: the numbers of two nodes, from 0, on a line for each edge.

    What follows them, and what follows a #, is not read.

    Raises ``ConfigError`` for what cannot be read, for other numbers than those of the nodes, an edge from a node to itself, and a
    graph that is not connected.
    """

    path: str
    """The file."""

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        try:
            lines = Path(self.path).expanduser().read_text().splitlines()
            # networkx passes over lines with a single number
            short = [i for i, line in enumerate(lines, 1) if len(line.partition("#")[0].split()) == 1]
            graph = nx.parse_edgelist(lines, nodetype=int, data=False)
        except (OSError, ValueError, TypeError) as error:
            raise self.refused("path", f"a list of edges, two numbers on a line ({error})") from None
        if short:
            raise self.refused("path", f"a list of edges, two numbers on a line (line {short[0]})")
        strange = sorted(set(graph) - set(range(nodes)))
        if strange:
            raise self.refused("path", f"nodes 0 to {nodes - 1} (it names {strange[0]})")
        loops = sorted(nx.nodes_with_selfloops(graph))
        if loops:
            raise self.refused("path", f"edges between two nodes (it joins {loops[0]} to itself)")
        graph.add_nodes_from(range(nodes))
        if not nx.is_connected(graph):
            raise self.refused("path", f"a connected graph of {nodes} nodes (it has {nx.number_connected_components(graph)} parts)")
        return graph
