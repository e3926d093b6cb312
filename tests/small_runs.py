"""Runs of schedules on a small scale, and everything the server saw in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import hanse as hs
from hanse.core.context import Context
from hanse.core.messages import Reply, Upload
from hanse.engines.simulation import Simulation
from hanse.methods.base import State
from hanse.track.run import Record

F80 = "evenly(1.0, 0.2)"
"""Seconds of a job: client 0 needs 1, the last one a fifth of it."""


@dataclass
class Seen:
    """Every committed round: the record, the model, and the replies collected for it."""

    records: list[Record] = field(default_factory=list)
    models: list[Tensor] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    """The round of each reply."""
    net: Any = None

    def start(self, net: Simulation) -> None:
        self.net, reply_of = net, net._reply

        def listening(*args: Any, **kwargs: Any) -> Reply:
            self.replies.append(reply_of(*args, **kwargs))
            self.rounds.append(net.round)
            return self.replies[-1]

        net._reply = listening  # type: ignore[method-assign]

    def write(self, record: Record) -> None:
        self.records.append(record)
        self.models.append(self.net.state["x"].clone())

    def close(self) -> None:
        pass

    @property
    def seconds(self) -> list[float]:
        """Virtual time after every round."""
        return [record["seconds"] for record in self.records]

    @property
    def cohorts(self) -> list[list[int]]:
        """Whose replies every round used."""
        return [record["cohort"] for record in self.records]

    def counted(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Deliveries of each client, and what they counted altogether, ``[N]`` each, from round ``first`` on."""
        deliveries, counted = torch.zeros(2, self.net.clients, dtype=torch.float64)
        for round, reply in zip(self.rounds, self.replies, strict=True):
            if round >= first:
                deliveries[reply.clients] += 1
                counted[reply.clients] += reply.shares.double()
        return deliveries, counted


def watch(
    federation: hs.Federation,
    schedule: hs.schedules.Schedule,
    rule: hs.methods.Method | None = None,
    rounds: int = 10,
    **engine: Any,
) -> Seen:
    """A run in one fixed arrangement without shortcuts, so that equal formulas give equal bits."""
    path = "vmap" if isinstance(federation.task, hs.tasks.quadratics) else "stacked"
    how = {"path": path, "chunk": federation.clients, "workers": 1, "threads": 1, "shortcuts": False} | engine
    seen = Seen()
    rule = rule or Tally()
    hs.run(
        federation,
        rule,
        schedule,
        rounds=rounds,
        evaluate=0,
        engine=hs.engines.local(**how),
        writers=[seen],
        on_start=seen.start,
    )
    return seen


def fleet(job: str = F80, trace: str = "always", loss: float = 0.0) -> hs.fleet.Fleet:
    """Devices whose whole job takes ``job`` seconds."""
    return hs.fleet.Fleet.parse(f"devices(job={job}, loss={loss}, trace={trace})")


def bowls(clients: int = 10, **how: Any) -> hs.Federation:
    """A quadratic a client, float64."""
    return hs.Federation(hs.tasks.quadratics(count=clients), clients, hs.natural(), fleet(**how), dtype="float64")


class Tally(hs.methods.FedAvg):
    """No training: every client sends 1, and remembers for how many jobs it did."""

    abstract: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ("done",)

    def train(self, ctx: Context) -> Upload:
        ctx.state["done"] = ctx.state["done"] + 1
        ones = torch.ones(len(ctx.ids), ctx.start.shape[-1], dtype=ctx.loss.dtype)
        return ctx.upload(self.weigh(ctx), delta=ones)

    def step(self, state: State, reply: Reply, round: int) -> State:
        return {**state, "x": state["x"] + reply.mean("delta")}


def done(seen: Seen) -> list[int]:
    """How many jobs each client remembers in a run of ``Tally``."""
    kept: Tensor = seen.net.kept.read(torch.arange(seen.net.clients))["done"]
    return [int(n) for n in kept[:, 0]]


def stop_after(rounds: int) -> Callable[[Simulation], None]:
    """For ``on_start``: the run stops after so many rounds, to be resumed."""

    def start(net: Simulation) -> None:
        commit = net.on_commit

        def last(net: Simulation) -> None:
            net.stopping = net.round == rounds
            commit(net)

        net.on_commit = last

    return start
