"""Gossip: no server; in every round all nodes train, exchange models with their neighbours, and average.

Lian et al.: "Can Decentralized Algorithms Outperform Centralized Algorithms?", NeurIPS 2017, arXiv 1705.09056 (D-PSGD); Sun, Li,
Wang: "Decentralized Federated Averaging", TPAMI 2023, arXiv 2104.11375 (DFedAvg, DFedAvgM); Shi et al.: "Improving the Model
Consistency of Decentralized Federated Learning", ICML 2023, arXiv 2302.04083 (DFedSAM, DFedSAM-MGS).

    z_i = what the rule makes of x_i on node i's data
    q = 1..Q:   z_i <- sum_l w_il z_l          over node i itself and its neighbours l
    x_i <- z_i

    D-PSGD       FedAvg(steps=1), Q = 1        DFedSAM       FedSAM, Q = 1
    DFedAvg      FedAvg, Q = 1                 DFedSAM-MGS   FedSAM, Q > 1
    DFedAvgM     FedAvg(local="sgd(momentum=0.9)"), Q = 1

Not here: the other D-PSGD, whose gradient is taken before averaging (``order="mix"`` averages, then trains from the average), and
DFedAvgM's quantised differences (a codec writes whole models).

A node that is away keeps its model, and its neighbours count their own for the missing one. Two phases: in an exchange nobody sees
a model that has been averaged in it already. Sent: Q models of a node to each of its neighbours; bytes count as sent, once.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from hanse.aggregators.merging import Merge, average
from hanse.core.errors import ConfigError
from hanse.core.messages import Reply, Tensors
from hanse.methods.base import Method, State
from hanse.schedules.network import Network, Schedule
from hanse.topologies import Mixing, Topology, ring


class Lockstep(Schedule):
    """Base of schedules without a server in whose rounds all nodes train, exchange models, and do something with them."""

    abstract: ClassVar[bool] = True

    topology: Topology = ring()
    """Who is whose neighbour."""
    patience: PositiveFloat = math.inf
    """Seconds after which a round goes on without those still training, who keep their models."""

    async def run(self, net: Network, method: Method) -> None:
        state, _ = net.begin(self._begin(net, method))
        everyone, fixed = torch.arange(net.clients), None if self.topology.varying else self.mixing(net)
        while net.going():
            here = net.there(everyone)
            if not bool(here.any()):
                await net.wait(anyone=True)
                here = net.there(everyone)
            state = await self._round(net, method, state, here, fixed or self.mixing(net))
            await net.commit(state)

    def mixing(self, net: Network) -> Mixing:
        """This round's W."""
        return Mixing.metropolis(self.topology.graph(net.clients, net.streams, net.round))

    def _begin(self, net: Network, method: Method) -> State:
        """Everybody's state: what the rule's server would hold, a row a node."""
        name = type(self).__name__
        if method.opens:
            raise ConfigError(f"method: {method} is not allowed with {name}: it begins with a server that hears from everybody")
        if net.problem.shares_buffers:
            raise ConfigError(
                f"buffers: 'average' is not allowed with {name}: nodes exchange no batch-norm statistics; use 'private'"
            )
        return {name: t.expand(net.clients, *t.shape).clone() for name, t in method.init(net.problem).items()}

    async def _round(self, net: Network, method: Method, state: State, here: Tensor, mixing: Mixing) -> State:
        """A round of the nodes that are there, bool ``[N]``; everybody's new state."""
        raise TypeError(f"{type(self).__name__} does not define _round")

    async def _train(self, net: Network, method: Method, state: State, here: Tensor) -> tuple[State, Tensor]:
        """The nodes that are there train and step; their states, and who has."""
        nodes = here.nonzero().squeeze(1)
        reply = await net.work(nodes, "train", method.message(rows(state, nodes)), self.patience)
        if reply.each.keys() - {"delta"} or (reply.rows and not reply.each):
            sent = ", ".join(sorted({*reply.each, *reply.rows}))
            raise ConfigError(
                f"method: {method} is not allowed with {type(self).__name__}: it needs a server, to which clients send {sent}"
            )
        return stepped(state, method, reply, net.round), torch.zeros_like(here).index_fill(0, reply.clients, True)


class gossip(Lockstep):
    """Rounds of training and averaging with neighbours; every node has a model of its own."""

    topology: Topology = ring()
    """Who is whose neighbour."""
    weights: Literal["metropolis", "samples"] = "metropolis"
    """metropolis: w_il = 1 / (1 + the larger number of neighbours), which keeps the mean of all models; samples: in proportion to
    the nodes' numbers of samples, which moves it."""
    own: Annotated[float, Field(ge=0, lt=1)] | None = None
    """What a node's own model weighs (beta), its neighbours sharing the rest equally, instead of ``weights``."""
    mixes: PositiveInt = 1
    """Exchanges a round, Q."""
    merge: Merge = average()
    """What a node makes of its own model and those it has received."""
    order: Literal["train", "mix"] = "train"
    """What comes first in a round: training, or averaging."""
    start: Literal["same", "own"] = "same"
    """Initial weights: the same everywhere, or drawn by every node for itself."""

    @model_validator(mode="after")
    def _one_weighting(self) -> gossip:
        if self.own is not None and self.weights != "metropolis":
            raise ValueError(f"gossip.own: {self.own} is not allowed with weights={self.weights!r}")
        return self

    def mixing(self, net: Network) -> Mixing:
        """This round's W."""
        graph = self.topology.graph(net.clients, net.streams, net.round)
        if self.own is not None:
            return Mixing.leaning(graph, self.own)
        return Mixing.metropolis(graph) if self.weights == "metropolis" else Mixing.proportional(graph, net.counts)

    def _begin(self, net: Network, method: Method) -> State:
        state = super()._begin(net, method)
        return state if self.start == "same" else {**state, "x": net.starts()}

    async def _round(self, net: Network, method: Method, state: State, here: Tensor, mixing: Mixing) -> State:
        before = state["x"]
        if self.order == "mix":
            state = await self._mix(net, state, mixing.without(~here), None)
        state, here = await self._train(net, method, state, here)
        return await self._mix(net, state, mixing.without(~here), before) if self.order == "train" else state

    async def _mix(self, net: Network, state: State, mixing: Mixing, before: Tensor | None) -> State:
        models = state["x"]
        for _ in range(self.mixes):
            received, weights = await net.exchange(models, mixing, before)
            models = self.merge(models, received, weights, net.problem.shared_layout)
        return {**state, "x": models}


def stepped(state: State, method: Method, reply: Reply, round: int) -> State:
    """Everybody's state after the rule's step of the nodes in ``reply``, each on its own row."""
    if not len(reply):
        return state
    moved = method.step(rows(state, reply.clients), reply, round)
    return {name: t.index_copy(0, reply.clients.to(t.device), moved[name]) for name, t in state.items()}


def rows(state: State, nodes: Tensor) -> Tensors:
    """The state of some nodes."""
    return {name: t[nodes] for name, t in state.items()}
