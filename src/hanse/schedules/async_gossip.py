"""Gossip without rounds: every node trains when its own time has come, and averages when it has heard from enough neighbours.

The protocol of Tian, Al-Ars, Kitsak, Hofstee: "Vanishing Variance Problem in Fully Decentralized Neural-Network Systems", 2024,
arXiv 2404.04616.

    every 8 to 12 seconds at node i:   x_i <- what the rule makes of x_i;   send x_i to all neighbours
    a model arrives:                   put it into the buffer;   B models are in it: x_i <- merge(x_i, buffer), buffer <- {}

What arrives while a node trains waits until it has. Where a neighbour is missing, further models of the others fill the buffer. A
round is as many trainings as there are nodes; a node's model at its end is what it trained last, before it averages.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from hanse.aggregators.merging import Merge, average
from hanse.core.streams import Streams
from hanse.fleet.distributions import Positive
from hanse.schedules.peers import Node, Peers
from hanse.topologies import Mixing, Topology, ring


class async_gossip(Peers):
    """Every node trains and averages at times of its own."""

    topology: Topology = ring()
    """Who is whose neighbour; one that does not change."""
    every: tuple[Positive, Positive] = (8.0, 12.0)
    """Shortest and longest time from the end of one training to the next, seconds; drawn anew every time."""
    own: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """What a node's own model weighs (beta); those received share the rest equally."""
    buffer: PositiveInt | None = None
    """Models to be received before averaging, B; None: as many as there are neighbours."""
    merge: Merge = average()
    """What a node makes of its own model and those it has received."""
    start: Literal["same", "own"] = "same"
    """Initial weights: the same everywhere, or drawn by every node for itself."""

    @model_validator(mode="after")
    def _possible(self) -> async_gossip:
        if self.every[0] > self.every[1]:
            raise ValueError(f"async_gossip.every: {self.every} is not allowed: the shorter time comes first")
        if self.topology.varying:
            raise ValueError(
                f"async_gossip.topology: {self.topology} is not allowed: it changes by rounds, which nobody counts here"
            )
        return self

    async def live(self, node: Node) -> None:
        near, (shortest, longest) = neighbours(self.topology, node.nodes, node.streams.seed)[node.id], self.every
        x = node.notes.get("x", node.start() if self.start == "own" else node.problem.start[: node.problem.shared])
        received: list[Tensor] = []
        for k in range(int(node.notes.get("trainings", torch.zeros(()))), 1 << 62):
            u = float(node.streams.uniform("gossip.interval", torch.tensor([node.id]), k))
            due = node.now + shortest + u * (longest - shortest)
            while node.now < due:
                try:
                    async with asyncio.timeout_at(due):
                        received.append((await node.receive()).tensors["x"])
                except TimeoutError:
                    break
                if len(received) >= (self.buffer or len(near)):
                    x = self._merged(x, received, node)
                    received = []
            x = await node.train(x, k)
            node.notes |= {"x": x, "trainings": torch.tensor(k + 1)}
            node.send(near, "model", x=x)
            node.hold(x)

    def _merged(self, x: Tensor, received: list[Tensor], node: Node) -> Tensor:
        models = torch.stack([x, *received])
        return self.merge(models, models, Mixing.into_one(len(received), self.own), node.problem.shared_layout)[0]


@lru_cache(maxsize=16)
def neighbours(topology: Topology, nodes: int, seed: int) -> list[list[int]]:
    """Every node's neighbours; in a simulation all nodes ask for the same graph."""
    graph = topology.graph(nodes, Streams(seed), 0)
    return [sorted(graph[i]) for i in range(nodes)]
