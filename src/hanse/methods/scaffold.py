"""SCAFFOLD: control variates that remove client drift.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
arXiv 1910.06378, Algorithm 1.

    direction:  grad F_i(w; e) - c_i + c
    option II:  c_i+ = c_i - c + (x - x_{i,K}) / (K lr)
    server:     x <- x + server_lr * mean_i Delta_i;   c <- c + (1/N) sum_{i in S} (c_i+ - c_i)

Sent: down x and c (2P), up Delta_i and c_i+ - c_i (2P). Kept: c_i (P). Both averages are uniform, as in the paper: mixing weighted
displacements with uniform control variates would be a different method.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from hanse.core.context import Context
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.optim import sgd
from hanse.core.problem import Problem
from hanse.core.samples import Batch
from hanse.methods.base import PlainSgd, State
from hanse.methods.fedavg import FedAvg


class Scaffold(FedAvg):
    """FedAvg with control variates (option II)."""

    keeps: ClassVar[tuple[str, ...]] = ("c",)
    local: PlainSgd = sgd()
    """Plain sgd."""
    weights: Literal["uniform"] = "uniform"
    """Always uniform."""

    def init(self, problem: Problem) -> State:
        state = super().init(problem)
        return {**state, "c": torch.zeros_like(state["x"])}

    def message(self, state: State) -> Tensors:
        return {**super().message(state), "c": state["c"]}

    def direction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        return ctx.grad(w, batch) - ctx.state["c"] + ctx.message["c"]

    def new_variate(self, ctx: Context, delta: Tensor) -> Tensor:
        """c_i+ by option II, ``[C, P]``."""
        return ctx.state["c"] - ctx.message["c"] - delta / ctx.lr / ctx.steps[:, None]

    def train(self, ctx: Context) -> Upload:
        delta = ctx.displacement(self.direction)
        c = self.new_variate(ctx, delta)
        change = c - ctx.state["c"]
        ctx.state["c"] = c
        return ctx.upload(self.weigh(ctx), delta=delta, change=change)

    def step(self, state: State, reply: Reply, round: int) -> State:
        new = super().step(state, reply, round)
        return {**new, "c": state["c"] + reply.sums["change"] / reply.population}
