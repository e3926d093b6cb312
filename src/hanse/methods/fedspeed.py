"""FedSpeed: a proximal term, a correction of the bias it brings, and gradients at perturbed points.

Sun, Shen, Huang, Ding, Tao: "FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization Accuracy",
ICLR 2023, arXiv 2302.10429; server step "all" as in the authors' code (github.com/woodenchild95/FL-Simulator).

    direction:  g1 = grad F_i(w; e);   g2 = grad F_i(w + rho g1 / (|g1| + 1e-7); e)        the same batch, |.| over all parameters
                (1 - alpha) g1 + alpha g2 + (w - x + h_i) / lam
    client:     h_i <- h_i + x_{i,K} - x                                                   absent clients keep h_i
    server:     all       x <- mean_{i in S} x_{i,K} + (1/N) sum_{i=1..N} h_i
                selected  x <- mean_{i in S} (x_{i,K} + h_i)                               the paper's Algorithm 1

-h_i / lam (ghat_i in the paper) is a moving average of the client's own gradients with weight c = 1 - (1 - lr/lam)^K on the newest,
hence lr < lam. At the fixed point it is grad F_i(x*). The two server steps agree when every client takes part; otherwise "selected"
adds the cohort's mean h_i, which does not vanish, and does not converge.

``clip`` bounds the data gradients g1 and g2, not the correction. With weights "samples" the mean of all h_i is weighted alike; the
sum of the weights of all clients is then taken as N times the cohort's mean weight (the fixed point does not depend on it).

Sent: down x (P); up Delta_i (P) in mode "all", Delta_i + h_i (P) in mode "selected". Kept: h_i (P) at the clients, the weighted sum
of all h_i at the server in mode "all". Two gradients a step, one if rho or alpha is 0.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from hanse.core.context import Context
from hanse.core.errors import ConfigError
from hanse.core.messages import Reply, Upload
from hanse.core.problem import Problem
from hanse.core.samples import Batch
from hanse.methods.base import State
from hanse.methods.fedavg import FedAvg


class FedSpeed(FedAvg):
    """FedAvg with a corrected proximal term and sharpness-aware gradients."""

    keeps: ClassVar[tuple[str, ...]] = ("h",)
    gradients: ClassVar[int] = 2

    weights: Literal["samples", "uniform"] = "uniform"
    """Averaging weights: all equal, or the clients' numbers of samples."""
    lam: PositiveFloat = 10.0
    """Proximal length lambda: the coefficient of the proximal term is 1 / lam. Must exceed the learning rate."""
    rho: NonNegativeFloat = 0.1
    """Length of the step up to the perturbed point."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the gradient at the perturbed point."""
    mode: Literal["all", "selected"] = "all"
    """all: the server adds the mean correction of all clients; selected: that of the participants, the paper's form."""
    correction: bool = True
    """Keep h_i; without it the rule is FedProx with mu = 1 / lam on perturbed gradients."""

    @model_validator(mode="after")
    def _contracts(self) -> FedSpeed:
        self.check(self.lr.at(0))
        return self

    def check(self, lr: float) -> None:
        """Raise ``ConfigError`` unless ``lr < lam``."""
        if lr >= self.lam:
            raise ConfigError(f"FedSpeed.lam: {self.lam} is not allowed: it must exceed the learning rate, {lr:g}")

    def init(self, problem: Problem) -> State:
        state = super().init(problem)
        return {**state, "h": torch.zeros_like(state["x"])} if self.correction and self.mode == "all" else state

    def direction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        g = ctx.grad(w, batch)
        if self.rho and self.alpha:
            up = w + self.rho / (g.norm(dim=1, keepdim=True) + 1e-7) * g
            g = (1 - self.alpha) * g + self.alpha * ctx.grad(up, batch)
        return g + 1 / self.lam * (w - ctx.start + ctx.state["h"])

    def train(self, ctx: Context) -> Upload:
        self.check(float(torch.as_tensor(ctx.lr).max()))
        delta = ctx.displacement(self.direction)
        if self.correction:
            ctx.state["h"] = ctx.state["h"] + delta
        return ctx.upload(self.weigh(ctx), delta=delta if self.mode == "all" else delta + ctx.state["h"])

    def step(self, state: State, reply: Reply, round: int) -> State:
        if "h" not in state:
            return super().step(state, reply, round)
        h = state["h"] + reply.sums["delta"]
        mean = h * (len(reply) / reply.population) / reply.weight.sum()
        return {**self.move(state, reply, reply.mean("delta") + mean), "h": h}
