"""FedAvg, and the ladder on which every rule of its family stands.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas: "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, arXiv 1602.05629.

    x_{i,0} = x;   x_{i,k+1} = x_{i,k} - lr * grad F_i(x_{i,k}; e)            client i, k = 0..K-1
    Delta_i = x_{i,K} - x;   x <- x + server_lr * sum_i w_i Delta_i / sum_i w_i      w_i = n_i (samples) or 1 (uniform)

Sent: down x, up Delta_i. Kept: nothing.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from hanse.core.context import Context
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.optim import Optimizer, sgd
from hanse.core.problem import Problem
from hanse.core.samples import Batch, Plan
from hanse.methods.base import Method, State


class FedAvg(Method):
    """Federated averaging."""

    abstract: ClassVar[bool] = False

    batch: PositiveInt = 32
    """Samples per local step."""
    epochs: PositiveInt = 1
    """Passes over the client's data, unless ``steps`` is set."""
    steps: PositiveInt | None = None
    """Local steps K, instead of ``epochs``."""
    shuffle: bool = True
    """A new order of the samples in every pass; False keeps the stored order."""
    weights: Literal["samples", "uniform"] = "samples"
    """Averaging weights: the clients' numbers of samples, or all equal."""
    server: Optimizer = sgd()
    """Server optimiser, on minus the averaged displacement."""
    server_lr: Annotated[float, Field(gt=0)] = 1.0
    """Server learning rate."""

    @property
    def plain(self) -> bool:
        return not self.robust and type(self).train is FedAvg.train and type(self).direction is FedAvg.direction

    def plan(self) -> Plan:
        return Plan(self.batch, self.epochs, self.steps, self.shuffle)

    def init(self, problem: Problem) -> State:
        x = problem.start[: problem.shared]
        shared = {"buffers": problem.shared_buffers} if problem.shares_buffers else {}
        return {"x": x, **shared, **{f"server.{n}": t for n, t in self.server.slots(x).items()}}

    def message(self, state: State) -> Tensors:
        return {n: state[n] for n in ("x", "buffers") if n in state}

    def direction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        """One local step's direction, ``[C, P]``; the local optimiser moves against it."""
        return ctx.grad(w, batch)

    def weight(self, counts: Tensor) -> Tensor:
        return counts if self.weights == "samples" else torch.ones_like(counts)

    def weigh(self, ctx: Context) -> Tensor:
        """Averaging weights ``[C]``."""
        return self.weight(ctx.counts.to(ctx.loss.dtype))

    def train(self, ctx: Context) -> Upload:
        weight = self.weigh(ctx)
        total = ctx.total_displacement(weight) if self.plain else None
        return ctx.upload(weight, delta=ctx.displacement(self.direction) if total is None else total)

    def step(self, state: State, reply: Reply, round: int) -> State:
        return self.move(state, reply, reply.mean("delta"))

    def move(self, state: State, reply: Reply, delta: Tensor) -> State:
        """Move the model along ``delta`` ``[P]`` (overwritten) by the server's optimiser, and average the clients' statistics."""
        x, slots = state["x"], {n: state[f"server.{n}"].clone() for n in self.server.slots(state["x"][:1])}
        d = self.server.direction(delta.neg_(), slots, x)
        shared = {"buffers": mean_buffers(state["buffers"], reply)} if "buffers" in state else {}
        return {**state, **shared, "x": x.sub(d, alpha=self.server_lr), **{f"server.{n}": t for n, t in slots.items()}}


def mean_buffers(before: Tensor, reply: Reply) -> Tensor:
    """The clients' statistics averaged with the reply's weights, ``[Q]``, or within each domain, ``[domains, Q]``."""
    if before.dim() == 1:
        return reply.sums["buffers"] / reply.weight.sum()  # values rather than changes: a discount would shrink them
    domain, weight = reply.rows["domain"], reply.weight[:, None]
    total = torch.zeros_like(before).index_add_(0, domain, weight * reply.rows["buffers"])
    weights = before.new_zeros(len(before), 1).index_add_(0, domain, weight)
    return torch.where(weights > 0, total / weights, before)
