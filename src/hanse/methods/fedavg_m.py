"""FedAvg-M and FedAvg-M-VR: momentum inside the local steps.

Cheng, Huang, Wu, Yuan: "Momentum Benefits Non-IID Federated Learning Simply and Provably", ICLR 2024, arXiv 2306.16504. FedAvg-M
is the same update as FedCM (Xu, Wang, Wang, Yao: "FedCM: Federated Learning with Client-level Momentum", arXiv 2106.10874).

    direction:  FedAvg-M      beta grad F_i(w; e) + (1 - beta) g
                FedAvg-M-VR   grad F_i(w; e) + (1 - beta) (g - grad F_i(x_prev; e))          the same batch e twice
    server:     g <- -mean_i Delta_i / (lr K);   x_prev <- x;   x <- x - gamma g              gamma = lr K by default

beta = 1 is FedAvg; with one step and all clients the two are averaged-momentum SGD and STORM. FedAvg-M does not remove the drift of
a constant ``lr``: its limit is that of FedAvg with the rate beta lr. g is divided by the rate of the round that made it, so that
``lr`` may decay. A client that took K_i of the K steps has its displacement scaled by K / K_i.

Start: g = 0 for FedAvg-M. FedAvg-M-VR has no direction before round 0, so that round takes plain steps, as if beta were 1, and the
first g is an average of gradients (over clients and steps), which is how STORM starts.

Sent: down x and g (2P; the -VR rule adds the number gamma, from which clients recover x_prev = x + gamma g), up Delta_i (P).
Kept: g at the server, nothing at the clients. The -VR rule computes two gradients a step.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from hanse.core.context import Context
from hanse.core.errors import ConfigError
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.optim import sgd
from hanse.core.problem import Problem
from hanse.core.samples import Batch
from hanse.methods.base import PlainSgd, State
from hanse.methods.fedavg import FedAvg


class FedAvg_M(FedAvg):
    """FedAvg with the last global direction mixed into every local step."""

    local: PlainSgd = sgd()
    """Plain sgd."""
    epochs: Literal[1] = 1
    """Not used: this rule counts local steps."""
    steps: PositiveInt = 10
    """Local steps K."""
    weights: Literal["samples", "uniform"] = "uniform"
    """Averaging weights: all equal, as in the paper, or the clients' numbers of samples."""
    beta: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the fresh gradient in a step; 1 is FedAvg."""
    gamma: PositiveFloat | None = None
    """Step of the server along g; None: lr K, which averages the clients' models."""

    @model_validator(mode="after")
    def _gamma_alone(self) -> FedAvg_M:
        if self.server != sgd() or self.server_lr != 1:
            raise ConfigError(f"{type(self).__name__}: the server moves by gamma g; set gamma instead of server or server_lr")
        return self

    def init(self, problem: Problem) -> State:
        state = super().init(problem)
        return {**state, "g": torch.zeros_like(state["x"])}

    def message(self, state: State) -> Tensors:
        return {**super().message(state), "g": state["g"]}

    def direction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        return self.beta * ctx.grad(w, batch) + (1 - self.beta) * ctx.message["g"]

    def train(self, ctx: Context) -> Upload:
        upload = super().train(ctx)
        delta = upload.sums["delta"]
        delta *= self.steps / ctx.steps[:, None].to(delta.dtype)
        return upload

    def step(self, state: State, reply: Reply, round: int) -> State:
        new = super().step(state, reply, round)
        g = reply.mean("delta").div_(-self.lr.at(round) * self.steps)
        return {**new, "g": g} if self.gamma is None else {**new, "g": g, "x": state["x"].sub(g, alpha=self.gamma)}


class FedAvg_M_VR(FedAvg_M):
    """FedAvg-M with a variance-reduced direction."""

    gradients: ClassVar[int] = 2

    def init(self, problem: Problem) -> State:
        state = super().init(problem)
        return {**state, "gamma": state["x"].new_zeros(1)}

    def message(self, state: State) -> Tensors:
        return {**super().message(state), "gamma": state["gamma"]}

    def direction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        return ctx.grad(w, batch) + self.correction(ctx, w, batch)

    def correction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        """``(1 - beta) (g - grad F_i(x_prev; e))``, zero before there is a g. Call it after ``ctx.grad`` at ``w``."""
        g, gamma = ctx.message["g"], ctx.message["gamma"]
        before = (ctx.start + gamma * g).expand_as(w)
        return (1 - self.beta) * gamma.sign() * (g - ctx.grad(before, batch))

    def step(self, state: State, reply: Reply, round: int) -> State:
        gamma = self.lr.at(round) * self.steps if self.gamma is None else self.gamma
        return {**super().step(state, reply, round), "gamma": torch.full_like(state["gamma"], gamma)}
