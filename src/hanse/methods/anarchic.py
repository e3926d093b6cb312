"""AFA-CD and AFA-CS: gradients per local step, from workers that take part when and as long as they like.

Yang, Zhang, Khanduri, Liu: "Anarchic Federated Learning", ICML 2022 (PMLR 162, 25331-25363), arXiv 2108.09875, Algorithms 1 and 2
(an earlier version calls them AFedAvg-TSLR-CD and -CS). Meant for the schedule ``anarchic``; they work under any.

    worker i:  from x_mu, K_i steps y <- y - lr * grad F_i(y; e);    G_i = (1/K_i) sum_j grad F_i(y_j; e_j) = (x_mu - y) / (lr K_i)
    AFA-CD:    x <- x - eta * (1/|M_t|) sum_{i in M_t} G_i                                             eta = server_lr
    AFA-CS:    Gbar <- Gbar + (1/M) sum_{i in M_t} (G_i - A_i);   A_i <- G_i;   x <- x - eta * Gbar    A_i = 0 at first

G_i is divided by the number of local steps, so that workers who work longer do not pull the average further their way. AFA-CD
averages what arrives and therefore minimises an objective in which frequent workers count more. AFA-CS averages the newest
contribution of each of all M workers, however long ago that was: Gbar is the mean of all A_i at any time, and its limit is the
minimiser of the uniform mean (with weights "samples" all averages are weighted). Where rounds have a barrier and all take K steps
it is ``MIFA`` with eta = lr K.

A_i is kept by the worker, which sends the difference, so the server holds two vectors instead of M + 1 (our choice). As long as
some workers have never reported, their zeros damp the step (our choice). Where a schedule counts a contribution less, AFA-CD
moves less along it; AFA-CS, whose average has to stay one, takes it in full.

Sent: down x, up one vector; K_i, which the server does not use, stays at the worker. Kept: nothing, or A_i. With a local optimiser
other than plain sgd G_i is the displacement form, which is then no mean of gradients.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hanse.core.context import Context
from hanse.core.messages import Reply, Upload
from hanse.core.problem import Problem
from hanse.methods.base import State
from hanse.methods.fedavg import FedAvg


class AFA_CD(FedAvg):
    """Averages the normalised gradients that arrive (cross-device)."""

    weights: Literal["samples", "uniform"] = "uniform"
    """Averaging weights: all equal, or the clients' numbers of samples."""
    server_lr: Annotated[float, Field(gt=0)] = 0.1
    """Server rate eta. With a barrier lr * K gives FedAvg's step. With m of M workers a step, M / m times as many steps are taken
    from old gradients: lr * K * m / M moves as far for as much work, and is the default for lr = 0.1, K = 10, m = M / 10. Delays
    bound it: 1 / (L (1 + longest delay)) for L-Lipschitz gradients."""

    def gradient(self, ctx: Context) -> Tensor:
        """G_i of every client, ``[C, P]``."""
        return -ctx.displacement(self.direction) / ctx.lr / ctx.steps[:, None]

    def train(self, ctx: Context) -> Upload:
        return ctx.upload(self.weigh(ctx), gradient=self.gradient(ctx))

    def step(self, state: State, reply: Reply, round: int) -> State:
        return self.move(state, reply, -reply.mean("gradient"))


class AFA_CS(AFA_CD):
    """Averages the newest normalised gradient of every worker (cross-silo)."""

    keeps: ClassVar[tuple[str, ...]] = ("a",)

    def init(self, problem: Problem) -> State:
        state = super().init(problem)
        return {**state, "gradient": torch.zeros_like(state["x"])}

    def train(self, ctx: Context) -> Upload:
        gradient = self.gradient(ctx)
        change = gradient - ctx.state["a"]
        ctx.state["a"] = gradient
        return ctx.upload(self.weigh(ctx), change=change)

    def step(self, state: State, reply: Reply, round: int) -> State:
        gradient = state["gradient"] + reply.sums["change"] / reply.everyone
        return {**self.move(state, reply, -gradient), "gradient": gradient}
