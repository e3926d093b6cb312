"""Updates of slow clients brought up to date at the server: by gradient inversion, or to first order.

Wang, Gao: "Tackling the Unlimited Staleness in Federated Learning with Intertwined Data and Device Heterogeneities", AAAI 2025,
arXiv 2309.13536. FirstOrder is its baseline, after Zheng et al.: "Asynchronous Stochastic Gradient Descent with Delay
Compensation", ICML 2017, arXiv 1609.08326. Client i delivers in round t what it did to the model of round t - tau:

    Delta_i = LocalUpdate(w^{t-tau}; D_i) - w^{t-tau},     LocalUpdate = E full-batch steps of plain gradient descent
    FirstOrder:      hat_i = Delta_i - lam Delta_i o Delta_i o (w^t - w^{t-tau})                            o by element
    StaleInversion:  D_rec = argmin_D |mask o (LocalUpdate(w^{t-tau}; D) - w^{t-tau} - Delta_i)|_1,   D = (X, softmax(L)) of n_rec
                     hat_i = g_t (LocalUpdate(w^t; D_rec) - w^t) + (1 - g_t) Delta_i
    server:          w <- w + server_lr * sum_i p_i hat_i

Only a stale update (tau > 0) that points elsewhere than the fresh ones of its round is inverted: its cosine distance to the nearest
of them exceeds the mean plus one standard deviation of the distances between them; with fewer than two to compare with, any does.
Adam searches X and L through all E steps, from noise; mask keeps the largest ``keep`` of |Delta_i| in models of more than ``dense``
numbers. The best D_rec on the way is taken; an update that none explains better than data that move nothing, |mask o Delta_i|_1,
stays raw.

Late in training the raw update is the better guess. The server finds out when a client delivers again: with Delta its new update,
from model w, E1 = |LocalUpdate(w; D_rec) - w - Delta| and E2 = |the raw update before - Delta|, means over max(10, tau / 2) rounds,
tau being the largest in the round. Once E1 >= E2, g_t falls from 1 to 0 over as many rounds, and from then on nothing is inverted.

The paper leaves open, and we chose: the threshold; both windows; softmax cross-entropy with soft labels in both places; the
comparison at w^t or w^{t+1}, whichever the client goes on from; rates that fall tenfold after 3/8, 5/8 and 7/8 of the search.

Inversion is an attack used as a tool: D_rec may resemble what the client holds. It lives no longer than the server's step, unless
``warm`` asks to start from the client's last one: then it is part of the server's state, **and of every checkpoint**.

Clients must do what the server unrolls: plain steps on all they hold, hence ``batch`` no smaller than that (smaller batches are
matched by as many full steps on D_rec). Private parameters, batch norm, losses other than cross-entropy and samples that are not
real numbers are refused. Rectified units invert less easily than smooth ones.

Sent: down x, up Delta_i, which the server sees one by one. Kept: nothing at the clients; at the server four vectors for each update
that was inverted, until its client delivers a later one, and how many ``inversions`` there were. FirstOrder keeps nothing.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.func import vmap

from hanse.aggregators import mean
from hanse.core import optim
from hanse.core.context import Context
from hanse.core.errors import ConfigError
from hanse.core.losses import cross_entropy
from hanse.core.messages import Reply, Upload
from hanse.core.problem import Problem
from hanse.core.streams import Streams
from hanse.methods.base import PlainMean, PlainSgd, State
from hanse.methods.fedavg import FedAvg


def _ordered(box: tuple[float, float]) -> tuple[float, float]:
    if box[0] >= box[1]:
        raise ValueError("the least value comes first, then a greater one")
    return box


Box = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_ordered)]
"""An interval."""


class RowByRow(FedAvg):
    """FedAvg whose server sees the updates one by one, which makes no difference to their average."""

    abstract: ClassVar[bool] = True

    aggregate: PlainMean = mean()
    """The mean."""

    def train(self, ctx: Context) -> Upload:
        return ctx.upload(self.weigh(ctx), rows={"delta": ctx.displacement(self.direction)})

    def average(self, reply: Reply, rows: Tensor) -> Tensor:
        """``rows`` ``[C, P]`` averaged as ``reply.mean`` does, in the same order of operations, so that the bits are FedAvg's."""
        weight = reply.weight if reply.scale is None else reply.weight * reply.scale
        return weight @ rows / (reply.weight.sum() if reply.total is None else reply.total)


class FirstOrder(RowByRow):
    """FedAvg that compensates the delay to first order, with the squared update for the Hessian's diagonal."""

    lam: NonNegativeFloat = 4.0
    """Strength of the compensation; 0 takes stale updates as they are. The smaller the local rate, the more it takes."""

    def step(self, state: State, reply: Reply, round: int) -> State:
        delta = reply.rows["delta"]
        hat = delta - self.lam * delta.square() * (state["x"] - starts(reply, reply.versions))
        return self.move(state, reply, self.average(reply, hat))


class StaleInversion(RowByRow):
    """FedAvg that turns stale updates into data and trains the current model on these."""

    local: PlainSgd = optim.sgd()
    """Plain sgd."""
    clip: None = None
    """Not to be had: the server's steps on D_rec would not be clipped alike."""
    steps: PositiveInt = 5
    """Local steps E."""
    batch: PositiveInt = 600
    """Samples per local step; no fewer than a client holds, or the server's full steps are not what the client did."""
    n_rec: PositiveInt = 32
    """Samples in D_rec."""
    n_it: PositiveInt = 500
    """Steps of the search for D_rec. The paper takes 10,000 to 40,000."""
    rate: PositiveFloat = 0.1
    """Adam's rate on X and L."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the update's entries that D_rec has to match, the largest ones, in large models."""
    dense: NonNegativeInt = 100_000
    """Numbers in the largest model whose updates are matched in full."""
    box: Box | None = None
    """Least and greatest value of an input, to which X is held; None: any."""
    warm: PositiveInt | None = None
    """Steps of the search when it starts from the client's last D_rec, which then stays in the server's state and its checkpoints;
    None: it always starts from noise, and D_rec is kept nowhere."""
    seed: NonNegativeInt = 0
    """Draws the noise the search starts from, for each client and version."""

    def init(self, problem: Problem) -> State:
        """Raises ``ConfigError`` for a problem whose updates cannot be inverted."""
        state, output = super().init(problem), invertible(problem)
        none, rows = torch.zeros(0, dtype=torch.long), state["x"].new_zeros(0, len(state["x"]))
        state |= {
            "inversions": torch.zeros(1, dtype=torch.long),
            "switch": torch.tensor([-1, 1]),
            "errors": torch.zeros(0, 3, dtype=torch.float64),
            **{f"past.{n}": none for n in ("client", "version")},
            **{f"past.{n}": rows for n in ("hat", "raw")},
        }
        if self.warm is not None:
            assert problem.sample is not None
            x, labels = (t.new_zeros(0, self.n_rec, *t.shape[1:]) for t in (problem.sample, output))
            state |= {"rec.client": none, "rec.x": x, "rec.labels": labels}
        return state

    def step(self, state: State, reply: Reply, round: int) -> State:
        state = self._judged(state, reply, round)
        delta, late = reply.rows["delta"], reply.versions < round
        g = trust(state["switch"], round)
        which = (late & unique(delta, ~late)).nonzero().squeeze(1)
        if not g or not len(which):
            return self.move(state, reply, self.average(reply, delta))
        problem, clients, versions, raw = reply.problem, reply.clients[which], reply.versions[which], delta[which]
        assert problem is not None
        x, labels, cost = self._inverted(state, problem, starts(reply, versions), raw, clients, versions)
        now = self._update(problem, state["x"], x, labels, round)
        good = (cost[1] < cost[0]) & now.isfinite().all(1)
        hat = delta.clone()
        hat[which] = torch.where(good[:, None], g * now + (1 - g) * raw, raw)
        moved = self.move(state, reply, self.average(reply, hat))
        after = self._update(problem, moved["x"], x, labels, round + 1)
        sure = good.cpu()
        past = {
            "client": torch.cat([clients[sure]] * 2),
            "version": torch.tensor([round, round + 1]).repeat_interleave(int(sure.sum())),
            "hat": torch.cat([now[good], after[good]]),
            "raw": torch.cat([raw[good]] * 2),
        }
        moved |= {f"past.{n}": torch.cat([state[f"past.{n}"].to(t.device), t]) for n, t in past.items()}
        if self.warm is not None:
            stay = ~torch.isin(state["rec.client"].cpu(), clients)
            rec = {"client": clients[sure], "x": x[good], "labels": labels[good]}
            moved |= {f"rec.{n}": torch.cat([state[f"rec.{n}"].to(t.device)[stay], t]) for n, t in rec.items()}
        return {**moved, "inversions": state["inversions"] + len(which)}

    def _judged(self, state: State, reply: Reply, round: int) -> State:
        """Compare what was made of earlier updates with what their clients deliver now, and note when the raw ones are better.

        ``errors`` has a row a comparison: its round, E1, E2.
        """
        client, version = (state[f"past.{n}"].cpu() for n in ("client", "version"))
        same = client[:, None] == reply.clients
        i, j = (same & (version[:, None] == reply.versions)).nonzero(as_tuple=True)
        miss = [(state[f"past.{n}"][i] - reply.rows["delta"][j]).norm(dim=1).double().cpu() for n in ("hat", "raw")]
        errors = torch.cat([state["errors"].cpu(), torch.stack([torch.full_like(miss[0], round), *miss], 1)])
        length = max(10, math.ceil(int((round - reply.versions).max()) / 2))
        errors = errors[errors[:, 0] > round - length]
        _, e1, e2 = errors.mean(0).tolist()
        switch = torch.tensor([round, length]) if len(i) and int(state["switch"][0]) < 0 and e1 >= e2 else state["switch"]
        waiting = ~(same & (version[:, None] <= reply.versions)).any(1)
        past = {n: t[waiting.to(t.device)] for n, t in state.items() if n.startswith("past.")}
        return {**state, **past, "errors": errors, "switch": switch}

    def _inverted(
        self, state: State, problem: Problem, start: Tensor, delta: Tensor, clients: Tensor, versions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``invert``, from noise or from the clients' last D_rec."""
        x, labels = self.noise(problem, clients, versions)
        known = torch.zeros(len(clients), dtype=torch.bool)
        if self.warm is not None and len(state["rec.client"]):
            same = clients[:, None] == state["rec.client"].cpu()
            known, place = same.any(1), same.int().argmax(1)
            x[known], labels[known] = (state[f"rec.{n}"][place[known]] for n in ("x", "labels"))
        rate = torch.tensor([self.lr.at(v) for v in versions.tolist()], dtype=start.dtype, device=start.device)[:, None]
        cost = start.new_empty(2, len(clients))
        for group, n_it in ((~known, self.n_it), (known, self.warm)):
            if n_it is not None and bool(group.any()):
                found = self.invert(problem, start[group], delta[group], x[group], labels[group], rate[group], n_it)
                x[group], labels[group], cost[:, group] = found
        return x, labels, cost

    def noise(self, problem: Problem, clients: Tensor, versions: Tensor) -> tuple[Tensor, Tensor]:
        """Where the search starts: normal X ``[S, n_rec, ...]`` held to the box, and normal L ``[S, n_rec, classes]``."""
        assert problem.sample is not None
        shapes = [(self.n_rec, *t.shape[1:]) for t in (problem.sample, invertible(problem))]
        sizes = [math.prod(shape) for shape in shapes]
        drawn = Streams(self.seed).normal("stale_inversion", clients, versions, sum(sizes)).to(problem.start)
        x, labels = (t.reshape(-1, *shape).clone() for t, shape in zip(drawn.split_with_sizes(sizes, 1), shapes, strict=True))
        return self._boxed(x), labels

    def _boxed(self, x: Tensor) -> Tensor:
        return x if self.box is None else x.clamp(*self.box)

    def invert(
        self, problem: Problem, start: Tensor, delta: Tensor, x: Tensor, labels: Tensor, rate: Tensor, n_it: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Search D_rec for S updates ``delta`` from models ``start``, both ``[S, P]``, at local rates ``rate`` ``[S, 1]``.

        Returns the best X and L on the way, and two costs ``[2, S]``: of data that move nothing, and theirs, which is the same if
        none were better. Each search is on its own: nothing is shared.
        """
        mask = largest(delta, self.keep) if delta.shape[1] > self.dense else torch.ones_like(delta)
        adam, fall = optim.adamw(weight_decay=0.0), (3 * n_it // 8, 5 * n_it // 8, 7 * n_it // 8)
        rates, slots = optim.steps(self.rate, milestones=fall), [adam.slots(x), adam.slots(labels)]
        nothing = (mask * delta).abs().sum(1)
        least, best, both = nothing, [x, labels], [x, labels]
        for k in range(n_it + 1):
            both = [v.detach().requires_grad_() for v in both]
            end = local_update(problem, start, both[0], both[1].softmax(-1), rate, self.steps)
            cost = (mask * (end - start - delta)).abs().sum(1)
            better = cost.detach() < least  # what is not a number is not less
            least = torch.where(better, cost.detach(), least)
            best = [torch.where(better.view(-1, *[1] * (v.dim() - 1)), v.detach(), b) for v, b in zip(both, best, strict=True)]
            ways = torch.autograd.grad(cost.sum(), both)
            both = [
                v - rates.at(k) * adam.direction(d, s, v) for v, d, s in zip(map(Tensor.detach, both), ways, slots, strict=True)
            ]
            both[0] = self._boxed(both[0])
        return best[0], best[1], torch.stack([nothing, least])

    def _update(self, problem: Problem, w: Tensor, x: Tensor, labels: Tensor, round: int) -> Tensor:
        """``LocalUpdate(w; D_rec) - w`` of every D_rec at the model ``w`` ``[P]`` of ``round``, ``[S, P]``."""
        return local_update(problem, w.expand(len(x), -1), x, labels.softmax(-1), self.lr.at(round), self.steps) - w


def invertible(problem: Problem) -> Tensor:
    """The model's output for a sample of zeros, ``[1, classes]``; raises ``ConfigError`` where updates cannot be inverted."""
    refusals = {
        "private parameters, which the server lacks": problem.layout.size > problem.shared,
        "batch norm, whose statistics the server lacks": problem.buffer_layout.size > 0,
        "samples that are not real numbers": problem.sample is None or not problem.sample.is_floating_point(),
        "a loss other than cross-entropy": problem.loss is not cross_entropy,
    }
    for wrong, found in refusals.items():
        if found:
            raise ConfigError(f"method: StaleInversion is not allowed with {wrong}")
    assert problem.sample is not None
    with torch.no_grad():
        output = problem.output(problem.start, problem.start_buffers, problem.sample)
    if output.dim() != 2:
        raise ConfigError("method: StaleInversion is not allowed with a model that gives more than one label a sample")
    return output


def local_update(problem: Problem, w: Tensor, x: Tensor, y: Tensor, lr: float | Tensor, steps: int) -> Tensor:
    """Where ``steps`` plain full-batch steps from ``w`` ``[S, P]`` end: each on its own samples ``x`` ``[S, n, ...]`` with the
    probabilities ``y`` ``[S, n, classes]``. Differentiable in ``x`` and ``y``, through all steps, if they require gradients.
    """
    forward, through = vmap(problem.output, in_dims=(0, None, 0)), x.requires_grad or y.requires_grad
    w = w.detach().requires_grad_()
    for _ in range(steps):
        output = forward(w, problem.start_buffers, x)
        loss = problem.loss(output.flatten(0, 1), y.flatten(0, 1)).sum() / x.shape[1]
        (g,) = torch.autograd.grad(loss, w, create_graph=through)
        w = w - lr * g
    return w if through else w.detach()


def largest(delta: Tensor, keep: float) -> Tensor:
    """1 at the ``ceil(keep P)`` largest magnitudes of each row of ``delta`` ``[S, P]``, else 0."""
    top = delta.abs().topk(math.ceil(keep * delta.shape[1]), 1).indices
    return torch.zeros_like(delta).scatter_(1, top, 1.0)


def unique(delta: Tensor, fresh: Tensor) -> Tensor:
    """Which rows of ``delta`` ``[C, P]`` point elsewhere than the ``fresh`` ones (bool ``[C]``) do, bool ``[C]``.

    The cosine distance to the nearest of them exceeds the mean plus one standard deviation of the distances between them; all do
    where there are fewer than two.
    """
    if int(fresh.sum()) < 2:
        return torch.ones_like(fresh)
    way = F.normalize(delta, dim=1)
    known = way[fresh]
    one, other = torch.triu_indices(len(known), len(known), 1)
    between = 1 - (known @ known.T)[one, other]
    nearest = 1 - (way @ known.T).amax(1)
    return (nearest > between.mean() + between.std(correction=0)).cpu()


def starts(reply: Reply, versions: Tensor) -> Tensor:
    """The models of ``versions`` ``[S]``, ``[S, P]``."""
    found, which = torch.unique(versions, return_inverse=True)
    return torch.stack([reply.starts[v]["x"] for v in found.tolist()])[which]


def trust(switch: Tensor, round: int) -> float:
    """g_t: 1 until the round ``switch[0]`` (-1: not yet known), 0 from ``switch[1]`` rounds after it on, falling evenly."""
    begun, length = switch.tolist()
    return 1.0 if begun < 0 else max(0.0, 1 - (round - begun) / length)
