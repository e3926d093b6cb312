"""MIFA and FedVARP: the last update of every client is remembered, so that absent clients count as well.

MIFA: Gu, Huang, Zhang, Huang: "Fast Federated Learning in the Presence of Arbitrary Device Unavailability", NeurIPS 2021,
arXiv 2106.04159. FedVARP: Jhunjhunwala, Sharma, Nagarkatti, Joshi: "FedVARP: Tackling the Variance Due to Partial Client
Participation in Federated Learning", UAI 2022, arXiv 2207.14130.

    client:     y_n <- Delta_n                                                   absent clients keep y_n, zero at first
    MIFA        x <- x + server_lr * mean_{n = 1..N} y_n                         the new ones
    FedVARP     x <- x + server_lr * (mean_{n in S} (Delta_n - y_n) + mean_{n = 1..N} y_n)         the old ones

The papers keep all y_n at the server (N P). Here each client keeps its own and sends the difference, so that the server needs no
more than their mean, and no single update. MIFA's theory has every client take part in round 0; here those never seen count as
zero. A schedule that discounts late updates does so in the step, not in what is remembered.

Sent: down x, up Delta_n - y_n. Kept: y_n (P) at the clients, their mean (P) at the server.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hanse.core.context import Context
from hanse.core.messages import Reply, Upload
from hanse.core.problem import Problem
from hanse.methods.base import State
from hanse.methods.fedavg import FedAvg


class MIFA(FedAvg):
    """FedAvg that steps by the mean of every client's last update."""

    keeps: ClassVar[tuple[str, ...]] = ("y",)

    weights: Literal["samples", "uniform"] = "uniform"
    """Averaging weights: all equal, or the clients' numbers of samples."""

    def init(self, problem: Problem) -> State:
        state = super().init(problem)
        return {**state, "y": torch.zeros_like(state["x"])}

    def train(self, ctx: Context) -> Upload:
        delta = ctx.displacement(self.direction)
        change = delta - ctx.state["y"]
        ctx.state["y"] = delta
        return ctx.upload(self.weigh(ctx), change=change)

    def change(self, reply: Reply) -> Tensor:
        """What the step adds to the old mean, ``[P]``."""
        return replace(reply, total=reply.everyone).mean("change")

    def step(self, state: State, reply: Reply, round: int) -> State:
        moved = self.move(state, reply, state["y"] + self.change(reply))
        return {**moved, "y": state["y"] + reply.sums["change"] / reply.everyone}


class FedVARP(MIFA):
    """FedAvg whose participants stand for the absent as far as they have changed."""

    def change(self, reply: Reply) -> Tensor:
        return reply.mean("change")
