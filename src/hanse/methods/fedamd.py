"""FedAMD: some participants refresh an average of large gradients, the others take variance-reduced steps from it.

Wu, Guo, Qu, He, Liu, Gao: "Anchor Sampling for Federated Learning with Partial Client Participation", ICML 2023, arXiv 2206.05891,
and the authors' code (github.com/HarliWu/FedAMD).

    start:   v_m = grad f_m(x_0; b');   vbar = (1/N) sum_m v_m                            every client, b' samples or all
    anchor:  v_m+ = grad f_m(x; b');   q_m = v_m+ - v_m                                   with probability p, no step
    miner:   g_0 = vbar;   g_k = g_{k-1} - grad f_m(x_{k-1}; B) + grad f_m(x_k; B)        otherwise; the same batch B twice
             x_{k+1} = x_k - lr g_k,   x_0 = x;   Delta_m = x_K - x
    server:  x <- x + server_lr * mean over miners of Delta_m;   vbar <- vbar + (1/N) sum over anchors of q_m

Miners work from the vbar before this round's anchors report. A round without a miner leaves x alone (and the server optimiser), one
without an anchor leaves vbar alone. Both averages are uniform. The roles are drawn anew for every participant and round; with
``period`` whole rounds have one role.

Our choices: clients shuffle (in the authors' code miners see the same batches in the same order every round); a client away at the
start has v_m = 0 until it first is an anchor, and counts so in vbar. Batch norm is refused: the paper fixes its statistics, because
gradients are compared that must differ by the weights alone.

Sent: down x and vbar (2P; with ``period`` also this round's p), up Delta_m or q_m (P), at the start v_m. Kept: v_m (P) at the
clients, vbar at the server. Two gradients a step but the first, where they cancel; virtual time counts two in every step, and
anchors and the start like miners.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from hanse.core.context import Context
from hanse.core.errors import ConfigError
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.optim import sgd
from hanse.core.problem import Problem
from hanse.core.samples import Batch
from hanse.methods.base import PlainSgd, State
from hanse.methods.fedavg import FedAvg


def anchor_probability(clients: int, cohort: int) -> float:
    """One of the authors' three ways to choose p (their EMNIST script), for ``cohort`` of ``clients`` a round: in [0.44, 0.5).

    It is sqrt(4 r^2 + 2 r) - 2 r with r = clients / cohort.
    """
    r = clients / cohort
    return math.sqrt(4 * r * r + 2 * r) - 2 * r


class FedAMD(FedAvg):
    """FedAvg whose participants are anchors or miners."""

    keeps: ClassVar[tuple[str, ...]] = ("v",)
    gradients: ClassVar[int] = 2
    opens: ClassVar[bool] = True

    local: PlainSgd = sgd()
    """Plain sgd."""
    steps: PositiveInt | None = 10
    """Local steps K of a miner, instead of ``epochs``."""
    weights: Literal["uniform"] = "uniform"
    """Always uniform."""
    p: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Probability that a participant is an anchor, not used with ``period``; 0 never refreshes vbar."""
    period: Annotated[int, Field(ge=2)] | None = None
    """Every ``period``-th round, from the first one on, has only anchors, and the others only miners."""
    anchor_batch: PositiveInt | None = None
    """Samples in an anchor's gradient b'; None: all of the client's."""

    def init(self, problem: Problem) -> State:
        """The server's state before round 0; raises ``ConfigError`` on a model with batch norm."""
        if problem.buffer_layout.size:
            raise ConfigError("FedAMD: a model with batch norm is not allowed: its gradients depend on more than the weights")
        state = super().init(problem)
        certain = {} if self.period is None else {"p": state["x"].new_ones(1)}
        return {**state, "v": torch.zeros_like(state["x"]), **certain}

    def message(self, state: State) -> Tensors:
        return {**super().message(state), **{n: state[n] for n in ("v", "p") if n in state}}

    def open(self, ctx: Context) -> Upload:
        self.refresh(ctx)
        return ctx.upload(self.weigh(ctx), v=ctx.state["v"])

    def opened(self, state: State, reply: Reply) -> State:
        return {**state, "v": reply.sums["v"] / reply.population}

    def anchors(self, ctx: Context) -> Tensor:
        """Who is an anchor, bool ``[C]``."""
        u = ctx.streams.uniform("role", ctx.ids, ctx.rounds).to(ctx.loss.device)
        return (u < ctx.message.get("p", self.p))[:, 0]

    def refresh(self, ctx: Context) -> Tensor:
        """The work of anchors: q_m ``[C, P]``."""
        old = ctx.state["v"]
        ctx.state["v"] = ctx.large_gradient(ctx.start.expand_as(old), self.anchor_batch)
        return ctx.state["v"] - old

    def mine(self, ctx: Context) -> Tensor:
        """The work of miners: Delta_m ``[C, P]``."""
        ctx.state["g"] = ctx.message["v"].expand_as(ctx.state["v"]).clone()
        ctx.state["before"] = torch.empty_like(ctx.state["v"])
        return ctx.displacement(self.direction)

    def direction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        g, before = ctx.state["g"], ctx.state["before"]
        here = ctx.grad(w, batch)  # in the first step for the reported loss alone
        if batch.step:
            g += here - ctx.grad(before, batch)
        before.copy_(w)
        return g

    def part(self, ctx: Context, who: Tensor, work: Callable[[Context], Tensor]) -> Tensor:
        """What ``work`` gives for those of ``who`` (bool ``[C]``), ``[C, P]`` with zeros for the others."""
        found = torch.zeros_like(ctx.state["v"])
        if bool(who.any()):
            own = ctx.pick(who)
            found[who], ctx.loss[who] = work(own), own.loss
            for name, rows in ctx.state.items():
                rows[who] = own.state[name]
        return found

    def train(self, ctx: Context) -> Upload:
        anchors = self.anchors(ctx)
        miners = ~anchors
        change, delta = self.part(ctx, anchors, self.refresh), self.part(ctx, miners, self.mine)
        return ctx.upload(self.weigh(ctx), senders={"change": anchors, "delta": miners}, change=change, delta=delta)

    def step(self, state: State, reply: Reply, round: int) -> State:
        moved = self.move(state, reply, reply.mean("delta")) if bool(reply.senders["delta"].any()) else state
        new = {**moved, "v": state["v"] + reply.sums["change"] / reply.population}
        if self.period is not None:
            new["p"] = torch.full_like(state["p"], (round + 1) % self.period == 0)
        return new
