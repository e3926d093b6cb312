"""SCAFFOLD-M and SCAFFOLD-M-VR: momentum inside the local steps, and control variates.

Cheng, Huang, Wu, Yuan: "Momentum Benefits Non-IID Federated Learning Simply and Provably", ICLR 2024, arXiv 2306.16504.

    direction:  SCAFFOLD-M     beta (grad F_i(w; e) - c_i + c) + (1 - beta) g
                SCAFFOLD-M-VR  grad F_i(w; e) - beta (c_i - c) + (1 - beta) (g - grad F_i(x_prev; e))
    both:       c_i+ = (1/K) sum_k grad F_i(x_{i,k}; e_k);   c <- c + (1/N) sum_{i in S} (c_i+ - c_i)
    SCAFFOLD-M  c_i+ = ((x - x_{i,K}) / (lr K) - (1 - beta) g) / beta + c_i - c              the same, from the end point
    server:     g, x_prev and x as in FedAvg-M

beta = 1 is SCAFFOLD, option II; c = 0 is FedAvg-M or FedAvg-M-VR. The coefficient beta before (c_i - c) in the -VR direction is the
one that has both of these limits.

Sent: down x, g and c (3P; the -VR rule adds the number gamma), up Delta_i and c_i+ - c_i (2P). Kept: c_i (P) at the clients, g and
c at the server. Both averages are uniform, as in the paper.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hanse.core.context import Context
from hanse.core.messages import Upload
from hanse.core.optim import sgd
from hanse.core.samples import Batch
from hanse.methods.base import PlainSgd
from hanse.methods.fedavg_m import FedAvg_M, FedAvg_M_VR
from hanse.methods.scaffold import Scaffold


class Scaffold_M(FedAvg_M, Scaffold):
    """SCAFFOLD with the last global direction mixed into every local step."""

    local: PlainSgd = sgd()
    """Plain sgd."""
    weights: Literal["uniform"] = "uniform"
    """Always uniform."""

    def direction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        fresh = Scaffold.direction(self, ctx, w, batch)
        return self.beta * fresh + (1 - self.beta) * ctx.message["g"]

    def new_variate(self, ctx: Context, delta: Tensor) -> Tensor:
        mean = -delta / ctx.lr / ctx.steps[:, None]
        return (mean - (1 - self.beta) * ctx.message["g"]) / self.beta + ctx.state["c"] - ctx.message["c"]


class Scaffold_M_VR(FedAvg_M_VR, Scaffold):
    """SCAFFOLD-M with a variance-reduced direction."""

    local: PlainSgd = sgd()
    """Plain sgd."""
    weights: Literal["uniform"] = "uniform"
    """Always uniform."""

    def direction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        g = ctx.grad(w, batch)
        ctx.state["sum"] += g
        return g - self.beta * (ctx.state["c"] - ctx.message["c"]) + self.correction(ctx, w, batch)

    def train(self, ctx: Context) -> Upload:
        ctx.state["sum"] = torch.zeros_like(ctx.state["c"])  # of gradients; the end point would mix in those at x_prev
        return super().train(ctx)

    def new_variate(self, ctx: Context, delta: Tensor) -> Tensor:
        return ctx.state.pop("sum") / ctx.steps[:, None]  # popped, because what stays in the state is kept
