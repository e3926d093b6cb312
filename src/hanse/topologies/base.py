"""What every topology is."""

from __future__ import annotations

from typing import ClassVar

import networkx as nx

from hanse.core.errors import ConfigError
from hanse.core.part import Part
from hanse.core.streams import Streams


class Topology(Part):
    """Base of all topologies."""

    kind: ClassVar[str] = "topology"
    abstract: ClassVar[bool] = True
    varying: ClassVar[bool] = False
    """Whether the graph differs from round to round; if not, the round is of no effect."""

    def graph(self, nodes: int, streams: Streams, round: int) -> nx.Graph:
        """The undirected graph of a round: nodes 0 to ``nodes - 1``, no edge from a node to itself.

        One that is the same in all rounds is connected. Raises ``ConfigError`` for settings that so many nodes cannot have.
        """
        raise TypeError(f"{type(self).__name__} does not define graph")

    def refused(self, field: str, allowed: str) -> ConfigError:
        """The error for a field whose value does not fit the number of nodes."""
        return ConfigError(f"{type(self).__name__}.{field}: {getattr(self, field)!r} is not allowed: {allowed}")
