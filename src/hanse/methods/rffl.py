"""RFFL: reputations decide what a participant's update counts, how much of the aggregate it gets back, and whether it may stay.

Xu, Lyu: "A Reputation Mechanism Is All You Need: Collaborative Fairness and Adversarial Robustness in Federated Learning", FL-ICML
2021, arXiv 2011.10464.

    client:  theta_i <- theta_i + v_i                                     the reward for the last round; models never become one
             u_i = LocalTrain(theta_i) - theta_i, cut to norm gamma;      theta_i <- theta_i + u_i
    server:  g = sum_i w_i u_i / sum_i w_i                                w_i = n_i (or 1) in round 0, then max(r_i, 0)
             phi_i = <u_i, g> / max(|u_i| |g|, 1e-10)                     over all parameters together
             r_i <- alpha r_i + (1 - alpha) phi_i;   r <- r / sum r
             from round 10 on: r_i < beta / |R| leaves R, and r_i = 0;   r <- r / sum r
             q_i = max(r_i, 0) / max_j r_j
             v_i = in each layer of n entries the ceil(q_i n) of g of largest magnitude, else 0

The paper's round ends with the reward. Here a reward travels with the next request and is added before training, which is the same
sequence of sums. So round 0 brings g = 0 to everyone, whole (as many bytes as the start, which all know, would take), and the last
reward is never sent: a client's own model is that after its last own update. ``reward="replace"`` reads the paper's text
another way: the reward takes the place of u_i, which the client sends and does not add.

Our choices, where the paper and its code leave something open or differ:

    ceil(q n)        without the code's - 1, by which even q = 1 loses an entry of every layer
    w_i              max(r_i, 0), where the code takes negative weights; n_i again where nobody present has r_i > 0
    sum r <= 0       r stays as it was
    absent clients   r_i stays as it is, and those present share out what they had together, so that sum r = 1; before its first
                     round a client has 1 / N. Full participation, which the paper assumes, makes it the formulas above
    round 10         counts the rounds of the client itself
    lies about norm  the server cuts u_i to norm gamma as well, and takes 0 for one that is not finite
    x                the start plus every g: who gets all and gives nothing. It is there to be looked at, and never sent
    batch norm       statistics are no part of u; they have to be private

Known gaps: reputation is relative, so that a hostile majority wins; sizes n_i are what clients say (``weights="uniform"`` does
without); a client that sends its reward back as an update has a high phi.

Sent: down v_i, as places and values or as a bitmap and values, layer by layer; up u_i, which the server sees one by one. Kept:
theta_i (P) at the clients; r, R and the rounds of each (N) and g (P) at the server.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from hanse.aggregators import mean
from hanse.codecs import bitmap, layers, positions, shortest, topk
from hanse.codecs.base import Codec
from hanse.core.context import Context
from hanse.core.errors import ConfigError
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.optim import LearningRate, exponential, sgd
from hanse.core.problem import Problem
from hanse.fleet.population import Population
from hanse.methods.base import PlainMean, State
from hanse.methods.fedavg import FedAvg

TINY = 1e-10
"""Least product of norms that a cosine is divided by."""


def cosines(u: Tensor, g: Tensor) -> Tensor:
    """phi of updates ``[C, P]`` with ``g`` ``[P]``, ``[C]``; 0 where one of both is."""
    phi: Tensor = u @ g / (u.norm(dim=1) * g.norm()).clamp(min=TINY)
    return phi


class RFFL(FedAvg):
    """Every participant keeps a model of its own and gets as much of the aggregate as its reputation is worth."""

    keeps: ClassVar[tuple[str, ...]] = ("theta",)
    own_model: ClassVar[str | None] = "theta"
    down: ClassVar[Codec | None] = layers() | topk(rounding="up") | shortest(coders=(positions(), bitmap()))

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.95
    """What is left of a reputation after a round; 1 keeps the shares of the data as they are."""
    beta: Annotated[float, Field(ge=0, lt=1)] = 1 / 3
    """Whose reputation is below ``beta / |R|`` is removed; below 1, so that somebody always stays. 0 removes the negative ones."""
    warmup: NonNegativeInt = 10
    """Rounds of its own before a participant can be removed; fewer remove honest ones with few data."""
    gamma: PositiveFloat = 0.5
    """Largest norm of an update: 0.5 for MNIST, 0.15 for CIFAR-10, 1 for text."""
    reward: Literal["additive", "replace"] = "additive"
    """additive: on top of the own update, as in the authors' code; replace: instead of it."""
    lr: LearningRate = exponential(start=0.15, decay=0.977)
    """Local learning rate: MNIST's."""
    epochs: PositiveInt = 3
    """Passes over the client's data, unless ``steps`` is set."""
    weights: Literal["samples", "uniform"] = "samples"
    """Weights of round 0: the clients' numbers of samples, or all equal, where clients may lie about them."""
    aggregate: PlainMean = mean()
    """The mean by reputations."""

    @model_validator(mode="after")
    def _no_server_step(self) -> RFFL:
        if self.server != sgd() or self.server_lr != 1:
            raise ValueError("there is no server model to be moved; server and server_lr are not allowed")
        return self

    def init(self, problem: Problem) -> State:
        """The server's state before round 0; raises ``ConfigError`` where batch-norm statistics are not private.

        ``r`` float64, ``active`` (who is in R) and ``seen`` (rounds taken part in) have a row a client once there was a reply.
        """
        if problem.shares_buffers:
            raise ConfigError("buffers: 'average' is not allowed with RFFL: statistics are no part of an update; use 'private'")
        state = super().init(problem)
        books = {"r": torch.float64, "active": torch.bool, "seen": torch.long}
        return {**state, "g": torch.zeros_like(state["x"]), **{n: torch.zeros(0, dtype=kind) for n, kind in books.items()}}

    def kept(self, problem: Problem, population: Population) -> Tensors:
        return {"theta": problem.start[: problem.shared]}

    def message(self, state: State) -> Tensors:
        if state["g"].dim() > 1:
            raise ConfigError("schedule: gossip is not allowed with RFFL: it needs a server, which knows everybody's reputation")
        return {"g": state["g"]}

    def asked(self, state: State, clients: Tensor) -> Tensor:
        return clients[state["active"].cpu()[clients]] if len(state["active"]) else clients

    def parts(self, state: State, clients: Tensor) -> Tensor:
        """q, float64 ``[C]``."""
        r = state["r"].cpu().clamp(min=0)
        return r[clients] / r.max() if len(r) else torch.ones(len(clients), dtype=torch.float64)

    def cut(self, u: Tensor) -> Tensor:
        """Rows ``[C, P]`` of norm ``gamma`` at most; those that are not finite are 0."""
        norm = u.norm(dim=1, keepdim=True)
        return torch.where(norm.isfinite(), u * (self.gamma / norm).clamp(max=1), 0)

    def train(self, ctx: Context) -> Upload:
        theta = ctx.state["theta"] + ctx.message["g"]
        ctx.message, ctx.mixed = {"x": theta}, True  # everyone trains from its own model
        u = self.cut(ctx.displacement(self.direction))
        ctx.state["theta"] = theta + u if self.reward == "additive" else theta
        return ctx.upload(self.weigh(ctx), rows={"u": u})

    def step(self, state: State, reply: Reply, round: int) -> State:
        who, n = reply.clients.cpu(), reply.weight.double().cpu()
        books = tuple(state[name].cpu() for name in ("r", "active", "seen"))
        r, active, seen = books if len(books[0]) else self.opening(who, n, reply.population)
        u, w = self.cut(reply.rows["u"]), r[who].clamp(min=0)
        w = w if bool(w.sum() > 0) else n
        g = (w / w.sum()).to(u) @ u
        r = r.index_copy(0, who, self.judged(r[who], seen[who], cosines(u, g).double().cpu()))
        seen = seen.index_add(0, who, torch.ones_like(who))
        active = active & ~((seen > self.warmup) & (r < self.beta / int(active.sum())))
        r = torch.where(active, r, 0)
        return {**state, "x": state["x"] + g, "g": g, "r": r / r.sum(), "active": active, "seen": seen}

    def opening(self, who: Tensor, n: Tensor, everyone: int) -> tuple[Tensor, Tensor, Tensor]:
        """Reputations, R and rounds of ``everyone`` before the first reply, whose clients ``who`` share by their weights ``n``."""
        r = torch.full((everyone,), 1 / everyone, dtype=torch.float64).index_copy(0, who, n / n.sum() * (len(who) / everyone))
        return r, torch.ones(everyone, dtype=torch.bool), torch.zeros(everyone, dtype=torch.long)

    def judged(self, r: Tensor, seen: Tensor, phi: Tensor) -> Tensor:
        """What those present, ``[C]``, make of the reputation they have together; 0 of it is faded in a client's first round."""
        new = self.alpha * torch.where(seen > 0, r, 0) + (1 - self.alpha) * phi
        together, total = float(r.sum()), float(new.sum())
        return new * (together / total) if together > 0 and total > 0 else r
