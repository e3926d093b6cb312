"""FedKSeed: a model is a list of scalars, one for each of K seeds, and nothing else travels.

Qin, Chen, Qian, Ding, Li, Deng: "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under
18 Kilobytes", ICML 2024, arXiv 2312.06353; steps as in MeZO (Malladi et al., arXiv 2305.17333).

    w = w_0 - sum_j a_j z_j                                        z_j = N(0, I_P), drawn from seed j, j = 0..K-1
    local step: j ~ p;  g = (f(w + eps z_j; x) - f(w - eps z_j; x)) / (2 eps);  w <- w - lr g z_j          client i, tau times
    a_j <- a_j + sum_i p_i sum_{steps of i with seed j} lr g      p_i = n_i / sum n

so that the server's model is the average of the clients'. ``importance`` (FedKSeed-Pro): lambda_j is the mean of |g| clipped to
``most`` over all that was ever reported of seed j, beginning with one 0; p = softmax((lambda - min) / (max - min + 1e-10)).

Sent: down a (and p), K numbers each; up tau pairs of a seed's number (two bytes up to K = 32,768) and g. Kept: nothing; w_0 and the
seeds are known everywhere.
The learning rate is part of a, so any schedule of rates can be rebuilt; the paper sums g alone and needs a constant one. Weight
decay is not there, because w could not be rebuilt. A step whose difference is not finite, or larger than ``most``, is none.
Noise is drawn in the order of the layout's tensors by NumPy's Philox, on the CPU, whatever the device of the model.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
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


class FedKSeed(Method):
    """Full-parameter tuning by differences along K directions."""

    seeds: PositiveInt = 4096
    """Number of directions K; the model never leaves w_0 + span(z_1 .. z_K)."""
    eps: PositiveFloat = 5e-4
    """Size of a probe."""
    importance: bool = False
    """Draw seeds by what they have brought so far (FedKSeed-Pro)."""
    most: PositiveFloat = 1000.0
    """Largest difference of two losses that is believed, and largest |g| in the importance (c)."""
    steps: PositiveInt = 200
    """Local steps tau."""
    batch: PositiveInt = 1
    """Samples per local step."""
    master: NonNegativeInt = 0
    """From which all seeds follow."""
    lr: LearningRate = constant(value=1e-3)
    """Local learning rate; it has to shrink with the number of parameters: the paper takes 3e-7 for models of billions."""
    local: PlainSgd = sgd()
    """Local optimiser: plain steps alone can be rebuilt."""
    clip: None = None
    """There is no gradient to clip."""
    aggregate: PlainMean = mean()
    """The mean: a is the sum of what clients report."""

    @property
    def narrowest(self) -> torch.dtype:
        """The type that a seed's number travels in."""
        return torch.int16 if self.seeds <= 1 << 15 else torch.int32

    def plan(self) -> Plan:
        return Plan(self.batch, 1, self.steps)

    def init(self, problem: Problem) -> State:
        zeros = torch.zeros(self.seeds, device=problem.device)
        history = {"sizes": zeros, "reports": zeros + 1} if self.importance else {}
        return {"x": problem.start[: problem.shared], "a": zeros, **history}

    def message(self, state: State) -> Tensors:
        return {"a": state["a"], "p": self.law(state)} if self.importance else {"a": state["a"]}

    def law(self, state: State) -> Tensor:
        """p, float32 ``[K]``, by the sums and numbers of the |g| reported."""
        size = state["sizes"] / state["reports"]
        return torch.softmax((size - size.min()) / (size.max() - size.min() + 1e-10), 0)

    def train(self, ctx: Context) -> Upload:
        a, layout = ctx.message["a"], ctx.problem.shared_layout
        starts = torch.stack([self.rebuilt(ctx.problem, one) for one in (a if ctx.mixed else a[None])])
        w, which = starts.expand(len(ctx.ids), -1).clone(), self._draw(ctx)
        if int(ctx.steps.max()) > self.steps:
            raise ConfigError(
                f"schedule: {int(ctx.steps.max())} local steps are not allowed with {self.short_name}: at most {self.steps}"
            )
        found = w.new_zeros(which.shape)  # 0: not done, or not to be believed
        for view, batch in ctx.batches():
            here, j = w[: len(view.ids)], which[: len(view.ids), batch.step]
            self.nudge(layout, here, j, torch.full_like(here[:, 0], self.eps))
            above = view.losses(here, batch)
            self.nudge(layout, here, j, torch.full_like(here[:, 0], -2 * self.eps))
            below = view.losses(here, batch)
            g = (above - below) / (2 * self.eps)
            g = torch.where(g.isfinite() & ((above - below).abs() <= self.most), g, 0)
            self.nudge(layout, here, j, self.eps - g * (view.lr.flatten() if isinstance(view.lr, Tensor) else view.lr))
            found[: len(here), batch.step] = g
            view.loss += (above + below).nan_to_num(0) / 2
        ctx.loss /= ctx.steps.clamp(min=1)
        return ctx.upload(ctx.counts.to(ctx.loss.dtype), rows={"seeds": which.to(self.narrowest), "g": found})

    def step(self, state: State, reply: Reply, round: int) -> State:
        if not len(reply):
            return state
        assert reply.problem is not None
        which, g = reply.rows["seeds"].long(), reply.rows["g"]
        rates = g.new_tensor([self.lr.at(version) for version in reply.versions.tolist()])
        weight = reply.weight if reply.scale is None else reply.weight * reply.scale
        share = rates * weight / (reply.weight.sum() if reply.total is None else reply.total)
        a = state["a"].double().index_add(0, which.flatten(), (share[:, None] * g).double().flatten()).float()
        after = {**state, "a": a, "x": self.rebuilt(reply.problem, a)}
        if self.importance:
            told = which[g != 0]
            after["sizes"] = state["sizes"].index_add(0, told, g[g != 0].abs().clamp(max=self.most).float())
            after["reports"] = state["reports"].index_add(0, told, torch.ones(len(told), device=told.device))
        return after

    def rebuilt(self, problem: Problem, a: Tensor) -> Tensor:
        """The model of the scalars ``a`` ``[K]``: one pass over it for each that is not zero."""
        w = problem.start[: problem.shared].clone()
        for j in a.nonzero().flatten():
            self.nudge(problem.shared_layout, w[None], j[None], -a[j][None])
        return w

    def nudge(self, layout: Layout, w: Tensor, j: Tensor, by: Tensor) -> None:
        """``w_i += by_i z_{j_i}`` for every row of ``w`` ``[C, P]``, in place.

        Noise is drawn tensor by tensor and never kept, so that beside the model only that of one tensor is in memory.
        """
        for row, seed, factor in zip(w, j.tolist(), by, strict=True):
            rng = Streams(self.master).numpy("kseed", seed)
            for part in layout.views(row).values():
                z = torch.from_numpy(rng.standard_normal(part.shape, np.float32))
                part.add_(z.to(part) * factor)

    def _draw(self, ctx: Context) -> Tensor:
        """The seeds of every local step, int64 ``[C, tau]``."""
        u = ctx.streams.uniform("kseed", ctx.ids, ctx.rounds, self.steps)
        if not self.importance:
            return (u * self.seeds).long()
        edges = ctx.message["p"].double().cumsum(-1).expand(len(u), -1)
        return torch.searchsorted(edges / edges[:, -1:], u).clamp(max=self.seeds - 1)
