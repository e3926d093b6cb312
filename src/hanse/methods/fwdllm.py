"""FwdLLM: tuning without back-propagation; clients only look at the loss on both sides of the model along random directions.

Xu, Cai, Wu, Li, Wang: "FwdLLM: Efficient Federated Finetuning of Large Language Models with Perturbed Inferences", USENIX ATC 2024,
arXiv 2308.13894.

    u = (f(x + h v; xi) - f(x - h v; xi)) / (2h) v,   v = N(0, I_P);   E[u] -> grad f as h -> 0       client i, K times
    U_1, U_2 <- sums of u, round after round in turn;   m_1, m_2 their means, n perturbations in all
    if mean over coordinates of (m_1 - m_2)^2 / 2 <= threshold:   g = (U_1 + U_2) / n;   x <- x - lr g;   U <- 0
    else x stays, U is kept, and the next round asks for more

so a round is a wave of perturbations, and as many waves make a step as the variance asks for. E|g - grad f|^2 is
(P + 1) |grad f|^2 / n: it is for few parameters. After ``most`` times the perturbations of the first step, one is taken anyway.

``candidates`` > 1 (discriminative sampling): of so many v the one with the largest |cos| to the last step's g is kept, tensor by
tensor (the authors keep the best of a pool for all mini-batches, by the signed cosine; u is the same for v and -v). g gets longer.

Sent: down x (and g, with candidates); up the sum of u and its count, or, with ``send="scalars"``, the K factors of v and the number
by which the server draws them again. Kept: nothing. A factor that is 0 or not finite is none; late ones count like others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from hanse.aggregators import mean
from hanse.core.context import Context
from hanse.core.errors import ConfigError
from hanse.core.layout import Layout
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.optim import LearningRate, constant, sgd
from hanse.core.problem import Problem
from hanse.core.samples import Plan
from hanse.core.streams import Streams
from hanse.methods.base import Method, PlainMean, PlainSgd, State


class FwdLLM(Method):
    """Forward gradients, as many as their variance asks for."""

    threshold: Annotated[float, Field(gt=0)] = 0.1
    """Largest variance with which a step is taken; inf: every round is a step."""
    h: PositiveFloat = 0.01
    """Size of a probe."""
    steps: PositiveInt = 4
    """Perturbations K of a client in a round, each on a batch of its own."""
    batch: PositiveInt = 8
    """Samples of a batch."""
    candidates: PositiveInt = 1
    """Directions of which one is kept; 1: the first is."""
    send: Literal["gradients", "scalars"] = "gradients"
    """What clients send: the sum of u, or the factors of v."""
    most: PositiveInt = 50
    """How many times the first step's perturbations a step may take."""
    master: NonNegativeInt = 0
    """From which all directions follow."""
    lr: LearningRate = constant(value=0.01)
    """The server's learning rate."""
    local: PlainSgd = sgd()
    """Clients take no steps."""
    clip: None = None
    """There is no gradient to clip."""
    aggregate: PlainMean = mean()
    """The mean: perturbations are added up over rounds."""

    def plan(self) -> Plan:
        return Plan(self.batch, 1, self.steps)

    def init(self, problem: Problem) -> State:
        x = problem.start[: problem.shared]
        nothing = {"sums": x.new_zeros(2, len(x)), "counts": x.new_zeros(2, dtype=torch.float64)}
        return {"x": x, "g": torch.zeros_like(x), "first": torch.zeros(1, dtype=torch.float64), **nothing}

    def message(self, state: State) -> Tensors:
        return {"x": state["x"], "g": state["g"]} if self.candidates > 1 else {"x": state["x"]}

    def weight(self, counts: Tensor) -> Tensor:
        return torch.ones_like(counts)

    def train(self, ctx: Context) -> Upload:
        clients, layout = len(ctx.ids), ctx.problem.shared_layout
        x = ctx.start.expand(clients, -1)
        old = ctx.message["g"].expand(clients, -1) if self.candidates > 1 else torch.zeros_like(x)
        if self.send == "scalars" and int(ctx.steps.max()) > self.steps:
            raise ConfigError(
                f"schedule: {int(ctx.steps.max())} local steps are not allowed with {self.short_name}: at most {self.steps}"
            )
        found, total = x.new_zeros(clients, max(self.steps, int(ctx.steps.max()))), torch.zeros_like(x)
        drawn = [self.directions(layout, i, t, g) for i, t, g in zip(ctx.ids.tolist(), ctx.rounds.tolist(), old, strict=True)]
        for view, batch in ctx.batches():
            here = len(view.ids)
            v = torch.stack([next(own) for own in drawn[:here]]).to(x)
            above, below = (view.losses(x[:here] + side * self.h * v, batch) for side in (1, -1))
            factor = (above - below) / (2 * self.h)
            found[:here, batch.step] = factor = torch.where(factor.isfinite(), factor, 0)
            view.loss += (above + below).nan_to_num(0) / 2
            if self.send == "gradients":
                total[:here] += factor[:, None] * v
        ctx.loss /= ctx.steps.clamp(min=1)
        one = torch.ones_like(ctx.loss)
        if self.send == "scalars":
            return ctx.upload(one, rows={"factors": found, "key": ctx.rounds[:, None]})
        return ctx.upload(one, u=total, count=(found != 0).sum(1).to(one))

    def step(self, state: State, reply: Reply, round: int) -> State:
        if not len(reply):
            return state
        u, count = self._told(state, reply)
        half = round % 2
        sums, counts = state["sums"].clone(), state["counts"].clone()
        sums[half] += u
        counts[half] += count
        n = float(counts.sum())
        enough = self.threshold == math.inf or self.variance(sums, counts) <= self.threshold
        first = float(state["first"])
        if n == 0 or not (enough or (first and n >= self.most * first)):
            return {**state, "sums": sums, "counts": counts}
        g = sums.sum(0) / n
        nothing = {"sums": torch.zeros_like(sums), "counts": torch.zeros_like(counts)}
        return {
            "x": state["x"] - self.lr.at(round) * g,
            "g": g,
            "first": state["first"] if first else counts.sum()[None],
            **nothing,
        }

    def variance(self, sums: Tensor, counts: Tensor) -> float:
        """Variance of the two halves' means, averaged over coordinates; infinite while one of them is empty."""
        if not counts.all():
            return math.inf
        one, other = sums / counts[:, None].to(sums)
        return float((one - other).double().square().mean()) / 2

    def directions(self, layout: Layout, client: int, key: int, old: Tensor) -> Iterator[Tensor]:
        """One v ``[P]`` after another, of a client's work; tensor by tensor the candidate that is nearest to ``old`` ``[P]``."""
        rng, goal = Streams(self.master).numpy("fwdllm", client, key), layout.views(old.cpu())
        many = self.candidates if bool(old.any()) else 1
        while True:
            parts = []
            for entry in layout.entries:
                each = torch.from_numpy(rng.standard_normal((many, entry.size), np.float32))
                near = (each @ goal[entry.name].flatten().to(each)).abs() / each.norm(dim=1) if many > 1 else torch.zeros(1)
                parts.append(each[int(near.argmax())])
            yield torch.cat(parts)

    def _told(self, state: State, reply: Reply) -> tuple[Tensor, float]:
        """The sum of u over all perturbations of a round, and their number."""
        if self.send == "gradients":
            return reply.sums["u"], float(reply.sums["count"])
        assert reply.problem is not None
        u, count = torch.zeros_like(state["x"]), 0
        whose = zip(reply.clients.tolist(), reply.rows["key"].flatten().tolist(), reply.versions.tolist(), strict=True)
        for (client, key, version), factors in zip(whose, reply.rows["factors"], strict=True):
            old = reply.starts[version]["g"] if self.candidates > 1 else torch.zeros_like(u)
            for v, factor in zip(self.directions(reply.problem.shared_layout, client, key, old), factors, strict=False):
                u += factor * v.to(u)
            count += int((factors != 0).sum())
        return u, float(count)
