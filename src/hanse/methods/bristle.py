"""Bristle: peers share output columns alone, and trust others class by class, by how well these do on a test set of their own.

Verbraeken, de Vos, Pouwelse: "Bristle: Decentralized Federated Learning in Byzantine, Non-i.i.d. Environments", 2021,
arXiv 2110.11006. This is what a peer does by itself; who exchanges with whom is the schedule ``bristle``.

Everything but the output layer, phi with D outputs, comes from elsewhere and is frozen; W in R^(C x D), without bias, starts at 0.
K_i are the classes that peer i has samples of (familiar ones), F_c and F_jc the F1 scores of its own and of peer j's columns on its
test samples, and n_ij = |K_i and K_j|.

    train       one step of the optimiser on a mini-batch, softmax cross-entropy over all C classes; w_c moves for c in K_i only
    integrate   S_j = the n_ij classes of K_i with the largest F_jc
                d = 10 |F_jc - F_c|,   s_jc = d^(3 + F_c) if F_jc > F_c, else -d^(4 + F_c)          c in S_j
                rho_j = max(0, mean_S F_jc - std_S F_jc)
                squash(s) = max(0, 10 / (1 + exp(-s / 100)) - 4)
                familiar c:   A_jc = rho_j squash(max(-100, s_jc)) if c in S_j, else 0
                foreign c:    A_jc = rho_j squash(sum_S s_jc)
                w_c <- (w_c + sum_j A_jc w_jc) / (1 + sum_j A_jc);   w_c <- w_c - mean(w_c)

Our choices: an empty S_j gives rho_j = 0, and an F1 score of 0/0 is 0. Of equal F_jc the lower class comes first. Where a peer has
heard from nobody, its columns stay as they are. phi is the same at all peers because a run holds frozen tensors once; processes of
their own would have to compare it when they meet.

A peer that copies the familiar columns of its victim and poisons the foreign ones scores perfectly: this rule does not see it.

Sent: W to each neighbour. Kept: the optimiser's memory, and test samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, vmap

from hanse.aggregators import mean
from hanse.core.context import Context
from hanse.core.errors import ConfigError
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.optim import LearningRate, Optimizer, adamw, constant, sgd
from hanse.core.problem import Problem
from hanse.core.samples import Batch, Samples
from hanse.fleet.population import Population
from hanse.methods.base import PlainMean, State
from hanse.methods.fedavg import FedAvg


class Bristle(FedAvg):
    """Trains the output columns of its own classes, and integrates others' by their F1 scores."""

    lr: LearningRate = constant(value=1e-3)
    """Local learning rate."""
    local: Optimizer = adamw(weight_decay=0.0)
    """Local optimiser, which remembers from round to round; without a weight decay of its own."""
    l2: NonNegativeFloat = 5e-3
    """L2 coefficient, whose gradient the optimiser gets; the authors take 1e-4 for WISDM."""
    batch: PositiveInt = 5
    """Samples per local step; the authors take 32 for CIFAR-10."""
    epochs: Literal[1] = 1
    """Not used: this rule counts local steps."""
    steps: PositiveInt = 1
    """Local steps between two messages."""
    server: Optimizer = sgd()
    """Not used: there is no server."""
    server_lr: Literal[1] = 1
    """Not used: there is no server."""
    aggregate: PlainMean = mean()
    """Not used: there is no server."""

    @model_validator(mode="after")
    def _no_other_decay(self) -> Bristle:
        if getattr(self.local, "weight_decay", 0):
            raise ValueError(f"local: {self.local} is not allowed: it moves columns of foreign classes; set l2 instead")
        if self.server != sgd():
            raise ValueError(f"server: {self.server} is not allowed: there is no server")
        return self

    def init(self, problem: Problem) -> State:
        """``x`` is W, and ``familiar`` is 1 for classes that a peer has, ``[classes]``, once it has trained.

        Raises ``ConfigError`` unless W is all that is trained.
        """
        classes, _ = columns(problem)
        x = torch.zeros_like(problem.start)
        return {"x": x, "familiar": x.new_zeros(classes)}

    def kept(self, problem: Problem, population: Population) -> Tensors:
        return {f"local.{name}": t for name, t in self.local.slots(torch.zeros_like(problem.start)).items()}

    def direction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        return ctx.grad(w, batch).add_(w, alpha=self.l2)

    def train(self, ctx: Context) -> Upload:
        classes, features = columns(ctx.problem)
        familiar = familiar_classes(ctx.samples, ctx.ids, classes)
        foreign = ~familiar.repeat_interleave(features, 1)
        slots = {name: ctx.state[f"local.{name}"] for name in self.local.slots(ctx.start[..., :1])}

        def familiar_direction(view: Context, w: Tensor, batch: Batch) -> Tensor:
            return self.direction(view, w, batch).masked_fill_(foreign[: len(w)], 0)

        w = ctx.descend(familiar_direction, slots)
        return ctx.upload(self.weigh(ctx), rows={"familiar": familiar.to(w)}, delta=w.sub_(ctx.start))

    def integrate(self, ctx: Context) -> Upload:
        """Of ``x`` ``[C, P]``, a peer's own columns, and ``candidates`` ``[C, k, P]``, its new ones, as the rows ``x``.

        Candidates count where ``valid`` ``[C, k]``, and share ``common`` ``[C, k]`` of its classes. Raises ``ConfigError`` where
        there are no test samples.
        """
        if ctx.tests is None or not len(ctx.tests.counts().nonzero()):
            raise ConfigError(f"partition.test: 0 is not allowed with {type(self).__name__}: each peer tries others on its own")
        (classes, features), own, candidates = columns(ctx.problem), ctx.message["x"], ctx.message["candidates"]
        scores = f1_scores(ctx.problem, torch.cat([own[:, None], candidates], 1), ctx.tests, ctx.ids, classes)
        familiar = familiar_classes(ctx.samples, ctx.ids, classes)
        common = ctx.message["common"] * ctx.message["valid"]
        weights = trust(scores[:, 0], scores[:, 1:], familiar, common)[..., None]
        w, others = (t.view(*t.shape[:-1], classes, features) for t in (own, candidates))
        w = (w + (weights * others).sum(1)) / (1 + weights.sum(1))
        return ctx.upload(self.weigh(ctx), rows={"x": (w - w.mean(-1, keepdim=True)).flatten(1)})

    def step(self, state: State, reply: Reply, round: int) -> State:
        if state["x"].dim() == 1:
            raise ConfigError(f"method: {self} is not allowed with a server: its clients are peers; use the schedule bristle")
        if "x" in reply.rows:
            return {**state, "x": reply.rows["x"]}
        return {**self.move(state, reply, reply.mean("delta")), "familiar": reply.rows["familiar"]}


def columns(problem: Problem) -> tuple[int, int]:
    """Numbers of classes and of features of the only trained tensor; raises ``ConfigError`` if there is anything beside it."""
    entries, shared = problem.layout.entries, len(problem.shared_layout.entries)
    if len(entries) == shared == 1 and len(entries[0].shape) == 2 and not problem.buffer_layout.size:
        classes, features = entries[0].shape
        return classes, features
    output = next((e.name for e in reversed(entries) if len(e.shape) == 2), "one weight [classes, features]")
    others = [e.name for e in (*entries, *problem.buffer_layout.entries) if e.name != output]
    raise ConfigError(
        f"frozen: {', '.join(others)} must be as well with Bristle, which trains {output} alone and shares it"
        if others
        else f"private: {output} is not allowed with Bristle, whose peers share one weight [classes, features]"
    )


def familiar_classes(samples: Samples, clients: Tensor, classes: int) -> Tensor:
    """Which classes ``clients`` ``[C]`` have samples of, bool ``[C, classes]``; raises ``ConfigError`` where labels are none."""
    if samples.y.dim() != 1 or samples.y.is_floating_point():
        raise ConfigError(f"task: labels of type {samples.y.dtype} and shape {tuple(samples.y.shape)} are not classes")
    counts = samples.counts(clients)
    owner = torch.repeat_interleave(torch.arange(len(clients)), counts)
    places = torch.arange(len(owner)) + (samples.offsets[clients] - counts.cumsum(0) + counts)[owner]
    labels = samples.y[(places if samples.index is None else samples.index[places]).to(samples.y.device)]
    found = torch.zeros(len(clients), classes, dtype=torch.bool, device=labels.device)
    found[owner.to(labels.device), labels] = True
    return found


def f1_scores(problem: Problem, models: Tensor, tests: Samples, clients: Tensor, classes: int) -> Tensor:
    """F1 score of every class, ``[C, m, classes]``, of ``models`` ``[C, m, P]`` on the test samples of ``clients``; 0/0 is 0."""
    counts, last = tests.counts(clients), int(tests.offsets[-1]) - 1
    place = torch.arange(max(1, int(counts.max())))
    real = place < counts[:, None]
    x, y = tests.take((tests.offsets[clients, None] + place * real).clamp(max=last))
    none = problem.start_buffers.expand(len(clients), -1)
    # The features do not depend on the outer axis, so they are computed once for all m models.
    outputs = vmap(lambda w: problem.outputs(w, none, x), in_dims=1, out_dims=1)(models)
    answers, one = outputs.argmax(-1), real.to(models)
    right, named = models.new_zeros(2, *models.shape[:2], classes)
    right.scatter_add_(2, answers, one[:, None] * (answers == y[:, None]))
    named.scatter_add_(2, answers, one[:, None].expand_as(answers))
    there = models.new_zeros(len(clients), classes).scatter_add_(1, y, one)
    scores: Tensor = 2 * right / (named + there[:, None]).clamp(min=1)
    return scores


def trust(own: Tensor, others: Tensor, familiar: Tensor, common: Tensor) -> Tensor:
    """Weights A_jc of k peers, ``[C, k, classes]``, from F1 scores: the ``own`` ``[C, classes]``, and theirs ``[C, k, classes]``.

    ``familiar`` bool ``[C, classes]`` are one's own classes, ``common`` ``[C, k]`` is the number of them that a peer has.
    """
    familiar, own = familiar[:, None], own[:, None]
    place = (-others.masked_fill(~familiar, -1)).argsort(dim=-1, stable=True).argsort(-1)
    chosen = familiar & (place < common[..., None])
    distance = 10 * (others - own).abs()
    score = torch.where(others > own, distance ** (3 + own), -(distance ** (4 + own))) * chosen
    size = chosen.sum(-1, keepdim=True).clamp(min=1)
    average = (others * chosen).sum(-1, keepdim=True) / size
    variance = ((others - average).square() * chosen).sum(-1, keepdim=True) / size
    certainty = (average - variance.sqrt()).clamp(min=0)
    of_familiar = squash(score.clamp(min=-100)) * chosen
    weights: Tensor = certainty * torch.where(familiar, of_familiar, squash(score.sum(-1, keepdim=True)))
    return weights


def squash(score: Tensor) -> Tensor:
    """``max(0, 10 / (1 + exp(-score / 100)) - 4)``: 1 at 0, at most 6, and 0 up to ``100 ln(2/3)``."""
    return (10 * torch.sigmoid(score / 100) - 4).clamp(min=0)
