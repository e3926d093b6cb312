"""Nodes that have no server: each asks itself, works for itself, and sends to its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hanse.core.errors import ConfigError
from hanse.core.messages import Reply, Tensors
from hanse.engines.exchange import Exchanges
from hanse.engines.execution import Lane, Orders
from hanse.engines.pending import Collected
from hanse.engines.programs import Outcome, Programs
from hanse.engines.rounds import Rounds
from hanse.fleet.clock import NEVER, nanoseconds
from hanse.methods.base import Method
from hanse.schedules.peers import Node
from hanse.topologies import Mixing


class Absent(dict[Any, Any]):
    """What of a reply there is not without a server; a rule that asks for it is refused."""

    def __init__(self, method: Method, what: str) -> None:
        super().__init__()
        self.method, self.what = method, what

    def __missing__(self, name: object) -> Any:
        raise ConfigError(f"method: {self.method} is not allowed without a server: it asks for the {self.what} of all replies")


class Peers(Rounds):
    """A network whose nodes need no server."""

    _losses: list[tuple[float, float]]

    def perform(self, orders: Orders, total: bool) -> list[Lane]:
        """Have orders executed."""
        raise TypeError(f"{type(self).__name__} does not define perform")

    @cached_property
    def exchanges(self) -> Exchanges:
        """What travels between peers; of a run with a server, nothing. Raises ``ConfigError`` on settings that mean a server."""
        if not self.down.plain:
            raise ConfigError(f"down: {self.down} is not allowed between peers: what they send is written by codec")
        if self.method.robust:
            raise ConfigError(f"aggregate: {self.method.aggregate} is not allowed between peers: use merge=robust(...) of gossip")
        if self.adversaries is not None and self.adversaries.attack.damages:
            raise ConfigError(
                f"attack: {self.adversaries.attack} is not allowed between peers: their messages are not encoded here"
            )
        return Exchanges(self.codec, self.problem.shared_layout, self.clock, self.streams, self.clients)

    @property
    def traffic(self) -> Tensor | None:
        """What each node has sent and received, bytes, int64 ``[N, 2]``; None with a server, to and from whom everything goes."""
        return self.exchanges.traffic if "exchanges" in self.__dict__ else None

    def set_traffic(self, traffic: Tensor) -> None:
        self.exchanges.traffic = traffic

    def starts(self) -> Tensor:
        return torch.stack([self.federation.start(client) for client in range(self.clients)])

    async def work(self, nodes: Tensor, work: str, message: Tensors, patience: float = math.inf) -> Reply:
        (done, over), last = (
            self.clock.finish(nodes, self._task(nodes, None)),
            min(self.clock.time + int(nanoseconds(patience)), NEVER),
        )
        there = torch.from_numpy(done <= min(last, NEVER - 1))
        waited = last if last < NEVER and not bool(there.all()) else int(over[over < NEVER].max(initial=0))
        self.clock.go_on(waited)
        ids, rows = nodes[there], {n: t[there] for n, t in message.items()}
        lanes = self._locally(work, ids, rows, torch.full_like(ids, self.round))
        self._keep(lanes)
        return self._among_peers(lanes, trained=work == "train")

    def _locally(self, work: str, nodes: Tensor, message: Tensors, rounds: Tensor) -> list[Lane]:
        """What ``nodes`` make of their rows of ``message``; their learning rates are those of ``rounds``. Nothing is kept yet.

        Work other than training has purposes of its own to draw for.
        """
        keys = torch.from_numpy(self._keys(nodes.numpy(), rounds.numpy())) if work == "train" else rounds
        steps, which = self._task(nodes, None).steps, torch.arange(len(nodes))
        orders = Orders(work, [message], nodes, nodes, keys, rounds, steps, which, own=True)
        return self.perform(orders, total=False) if len(nodes) else []

    def _among_peers(self, lanes: list[Lane], trained: bool) -> Reply:
        """The reply of nodes that are their own servers: it has nothing that only a server of all would have."""
        reply = self._reply({}, Collected(lanes, [], None), None, lambda rows, weights: rows, trained)
        return replace(reply, sums=Absent(self.method, "sums"), starts=Absent(self.method, "starts"))

    async def exchange(self, models: Tensor, mixing: Mixing, before: Tensor | None) -> tuple[Tensor, Mixing]:
        self.mixing = self.mixing or mixing
        if self.adversaries is None:
            return self.exchanges.send(models, mixing, self.round)
        if before is None and self.adversaries.attack.forges:
            raise ConfigError(
                f"attack: {self.adversaries.attack} is not allowed here: nobody has learned anything yet to lie about"
            )
        everyone, rounds = torch.arange(len(models)), torch.full((len(models),), self.round)
        start = models if before is None else before
        told = self.adversaries.models(start, models, everyone, rounds, self.problem.shared_layout)
        good = told.isfinite().all(1)
        arrived, weights = self.exchanges.send(torch.where(good[:, None], told, 0), mixing, self.round)
        return arrived, weights.losing(~good.cpu()[weights.neighbours])

    async def play(self, program: Callable[[Node], Coroutine[Any, Any, None]]) -> None:
        programs = Programs(
            self.federation,
            self.clock,
            self.streams,
            self.codec,
            self.exchanges.traffic,
            lambda nodes: self._task(nodes, None),
            self._trained,
            self._finished,
            self._played,
            self.state["x"],
        )
        self._losses = []
        self.letters = programs.counts
        programs.play(program, self.seconds)

    def _trained(self, nodes: Tensor, models: Tensor, rounds: Tensor) -> list[Outcome]:
        """What comes of ``models`` ``[C, P]`` in the work of ``nodes``; nothing is written down yet."""
        lanes = self._locally("train", nodes, self.method.message({"x": models}), rounds)
        reply = self._among_peers(lanes, trained=False)
        order, everyone = nodes.argsort(), torch.arange(len(nodes))
        at = order[torch.searchsorted(nodes[order], reply.clients)]
        after = models.index_copy(0, at.to(models.device), self.method.step({"x": models[at]}, reply, self.round)["x"])
        told = after
        if self.adversaries is not None:
            told = self.adversaries.models(models, after, nodes, rounds, self.problem.shared_layout)
        batches = [batch for lane in lanes for batch in lane.batches]
        kept = {n: torch.cat([batch.kept[n] for batch in batches]) for n in batches[0].kept}
        place = torch.empty_like(at).index_copy_(0, at, everyone)  # of each node among those that reply
        return [
            Outcome(
                after[i],
                None if told is after or bool(self.honest[nodes[i]]) else told[i] - after[i],
                {n: rows[place[i]] for n, rows in kept.items()},
                float(reply.loss[place[i]]),
                float(reply.weight[place[i]]),
            )
            for i in range(len(nodes))
        ]

    def _finished(self, node: int, outcome: Outcome) -> None:
        """A node has the result of its work: now it writes down what it keeps, and is in the round's record."""
        who = torch.tensor([node])
        if outcome.kept:
            self.kept.write(who, {n: row[None] for n, row in outcome.kept.items()})
        self.cohort = torch.cat([self.cohort, who])
        self._losses.append((outcome.loss, outcome.weight))
        weight = sum(w for _, w in self._losses)
        self.loss = sum(loss * w for loss, w in self._losses) / weight if weight else math.nan
        self.updates += 1
        self.taken[node] += 1

    def _played(self, x: Tensor) -> bool:
        """End a round with ``x``; whether there are more."""
        self._commit({"x": x}, {})
        self._losses = []
        return self.going()
