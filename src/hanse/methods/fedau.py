"""FedAU: clients that take part rarely count more, by a running mean of the gaps between their participations.

Wang, Ji: "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging", ICLR 2024, arXiv 2306.03401;
numbers of the authors' code (github.com/IBM/fedau).

    x <- x + server_lr * sum_{n there} a_n omega_n Delta_n          a_n = 1/N, N = all clients, however few take part

    FedAU               omega_n = mean length of the gaps that client n has finished before this round; 1 before the first
    AverageAll          omega_n = 1: an absent client counts as one that does not want to move
    KnownParticipation  omega_n = 1 / p_n

A gap is the rounds since the last participation, up to and with this one. With ``cutoff`` K it is cut into pieces of K rounds, each
of which counts as a gap as soon as it is over, whether the client is there or not. For independent participation with probability
p_n, E[omega_n] -> (1 - (1 - p_n)^K) / p_n, so K trades bias for variance; without it the limit is 1 / p_n. The gap that ends in a
round counts from the next one on; otherwise omega_n and being there would depend on each other.

The paper updates every client's counters in every round. Here a client does it when it takes part, by a closed form that gives the
same numbers (``mean_gap``), and multiplies its own update. That needs two numbers a client instead of three, because the finished
gaps of a client hold, together, all rounds until its last participation.

Who is there is up to the fleet's trace; with ``synchronous(cohort=N)`` everybody who is takes part. A client that is there but not
drawn, or whose reply is lost, counts as absent. Under a schedule without rounds the model's versions are the rounds. Averaging
over participants is ``FedAvg(weights="uniform")``. ``server_lr``: AverageAll needs about 1 / mean p_n, the others 1.

Sent: down x, up Delta_n. Kept: the numbers of gaps and of rounds in them (FedAU), p_n (KnownParticipation).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor

from hanse.core.context import Context
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.problem import Problem
from hanse.fleet.distributions import Amount, Limits, by_labels
from hanse.fleet.population import Population
from hanse.methods.base import State
from hanse.methods.fedavg import FedAvg

SEEN = Limits(sys.float_info.min, 1.0, "a probability above 0")


def mean_gap(gaps: Tensor, rounds: Tensor, now: Tensor, cutoff: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """What clients that take part in round ``now`` count, and their ``gaps`` and ``rounds`` afterwards; all alike in shape.

    ``gaps`` is the number of finished gaps, and ``rounds`` that of the rounds in them, which is one more than the last round in
    which the client took part. All are whole numbers; float32 holds them exactly up to 16 million.
    """
    cut = 0 if cutoff is None else torch.div(now - rounds, cutoff, rounding_mode="floor")  # pieces over before this round
    gaps, rounds = gaps + cut, rounds + cut * (cutoff or 0)
    return torch.where(gaps > 0, rounds / gaps.clamp(min=1), 1.0), gaps + 1, now + 1


class AverageAll(FedAvg):
    """FedAvg that divides by all registered clients instead of by the participants."""

    weights: Literal["samples", "uniform"] = "uniform"
    """Target weights a_n: all equal, as in the paper, or the clients' shares of all samples."""

    @property
    def plain(self) -> bool:
        return type(self).train is AverageAll.train and type(self).direction is FedAvg.direction

    def omega(self, ctx: Context) -> Tensor:
        """What clients multiply their updates with, ``[C]``; called once a job."""
        return torch.ones_like(ctx.loss)

    def train(self, ctx: Context) -> Upload:
        weight, omega = self.weigh(ctx), self.omega(ctx)
        total = ctx.total_displacement(weight * omega) if self.plain else None
        delta = ctx.displacement(self.direction).mul_(omega[:, None]) if total is None else total
        return ctx.upload(weight, delta=delta)

    def step(self, state: State, reply: Reply, round: int) -> State:
        return self.move(state, reply, replace(reply, total=reply.everyone).mean("delta"))


class FedAU(AverageAll):
    """AverageAll in which a client's update counts by the mean gap between its participations."""

    keeps: ClassVar[tuple[str, ...]] = ("gaps", "rounds")

    cutoff: PositiveInt | None = None
    """Longest gap K in rounds; longer ones are cut into pieces. None: no cutoff. The authors' examples also have 50."""
    cap: Annotated[float, Field(ge=1)] | None = None
    """Largest omega; None: no limit. How often it held a client back is kept as its ``capped``."""

    def kept(self, problem: Problem, population: Population) -> Tensors:
        names = self.keeps if self.cap is None else (*self.keeps, "capped")
        return {name: problem.start.new_zeros(1) for name in names}

    def omega(self, ctx: Context) -> Tensor:
        kept, now = ctx.state, ctx.rounds[:, None].to(ctx.loss)
        omega, kept["gaps"], kept["rounds"] = mean_gap(kept["gaps"], kept["rounds"], now, self.cutoff)
        if self.cap is not None:
            kept["capped"] = kept["capped"] + (omega > self.cap)
            omega = omega.clamp(max=self.cap)
        return omega[:, 0]


class KnownParticipation(AverageAll):
    """AverageAll in which an update counts by how improbable it was, for clients whose probabilities are known."""

    keeps: ClassVar[tuple[str, ...]] = ("p",)

    rate: Annotated[Amount, AfterValidator(SEEN.check)] = by_labels()
    """Probability p_n of taking part in a round, a number or a distribution over clients; as in the fleet's trace."""
    pattern: Literal["bernoulli", "markov", "cyclic"] = "bernoulli"
    """The fleet's trace. A distribution that is drawn, such as by_labels, is drawn anew for each kind of trace."""

    def kept(self, problem: Problem, population: Population) -> Tensors:
        p = SEEN.draw(self.rate, population, torch.arange(population.size), f"trace.{self.pattern}.rate")
        return {"p": p.to(problem.start)[:, None]}

    def omega(self, ctx: Context) -> Tensor:
        return 1 / ctx.state["p"][:, 0]
