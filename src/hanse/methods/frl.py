"""FRL: weights never change; clients vote on which of them to keep.

Mozaffari, Shejwalkar, Houmansadr: "Every Vote Counts: Ranking-Based Training of Federated Learning to Resist Poisoning Attacks",
USENIX Security 2023, arXiv 2110.04350, and its code (github.com/SPIN-UMass/FRL). For each layer l of n_l edges (weights):

    setup:   theta_l = +-sqrt(2 / fan_in), at random     s_l ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in))     m_l = sort(vote(s_l))
             A_l = ArgSort(ArgSort(vote(s_l)))                                             reputations: the place of every edge
    client:  s_l = m_l[A_l]                                                                scores out of reputations
             SGD on s:  w_l = theta_l * [mask(s_l) is among the k n_l largest],   dL/ds = dL/dw * theta * mask'(s)
             A_il = ArgSort(ArgSort(vote(s_l)))
    server:  A_l <- ArgSort(ArgSort(sum_i A_il))                                           one client, one vote

ArgSort is stable: the edge with the lower number is the lower of equals. The straight-through gradient passes edges that are left
out, so that they can come back. With ``key = "abs"`` vote and mask are |s|, mask' is sign(s): edges whose scores near 0 matter
least. This is our choice; the authors' code (``"reference"``) masks by |s|, but votes and writes back s itself, so that both ends
of the ranking are kept; ``"signed"`` is s for both. Within a client the rate falls with its passes e = 0..E-1 over the data as
(1 + cos(pi e / E)) / 2. A client's vote counts once, whatever its number of samples.

Parameters of one dimension have no scores and never change: biases are 0, those of normalisation layers what they are at first.
theta and s_l are drawn from a hash of the model's initial weights, which follow the federation's seed: it stands for the shared
seed. ``x`` is the masked model theta_l * [...] at the server.

Sent: down and up the reputations of every layer by itself, ``ceil(log2 n_l)`` bits an edge; a client's attack acts on its
reputations, and what it makes of them is a ranking again (``sign_flip`` reverses it, and with ``together=True`` it is the paper's
attack: the reverse of the liars' own vote). Kept: nothing. Not here: the sparse variant; sampling until liars are a minority.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from hanse.aggregators import mean
from hanse.codecs.base import Codec
from hanse.codecs.ranks import ranks, reputations
from hanse.core.context import Context
from hanse.core.errors import ConfigError
from hanse.core.layout import Entry
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.optim import LearningRate, Optimizer, exponential, sgd
from hanse.core.problem import Problem
from hanse.core.samples import Batch, Plan
from hanse.core.streams import Streams
from hanse.methods.base import Method, PlainMean, State


class FRL(Method):
    """Federated rank learning."""

    codec: ClassVar[Codec | None] = ranks()
    down: ClassVar[Codec | None] = ranks()

    k: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the edges of each layer that are kept."""
    key: Literal["abs", "reference", "signed"] = "abs"
    """What masks and votes go by: abs: |s|; reference: masks |s|, votes s; signed: s."""
    batch: PositiveInt = 8
    """Samples per local step."""
    epochs: PositiveInt = 2
    """Passes E over the client's data (the paper: 2 on MNIST, 5 on CIFAR-10)."""
    lr: LearningRate = exponential(0.4, 0.999)
    """Local learning rate of the scores, in the first pass."""
    local: Optimizer = sgd(momentum=0.9, weight_decay=1e-4)
    """Local optimiser."""
    aggregate: PlainMean = mean()
    """The mean: a vote is a sum."""

    def plan(self) -> Plan:
        return Plan(self.batch, self.epochs)

    def weight(self, counts: Tensor) -> Tensor:
        return torch.ones_like(counts)

    def init(self, problem: Problem) -> State:
        """Raises ``ConfigError`` on models with batch norm, with private parameters, or without any weights to choose from."""
        frozen = network(problem)
        if problem.buffer_layout.size:
            raise ConfigError("method: FRL is not allowed with batch norm: its statistics would go around the vote")
        if problem.layout.size > problem.shared:
            raise ConfigError("private: not allowed with FRL: all of the network is voted on")
        if not frozen.edges:
            raise ConfigError("method: FRL is not allowed: the model has no parameter with two or more dimensions to rank")
        return {"x": self._masked(frozen, frozen.scores), **self._ranked(frozen, frozen.scores)}

    def message(self, state: State) -> Tensors:
        return {name: values for name, values in state.items() if name != "x"}

    def train(self, ctx: Context) -> Upload:
        frozen, rate, passes = network(ctx.problem), ctx.lr, self.epochs

        def direction(view: Context, s: Tensor, batch: Batch) -> Tensor:
            # The optimiser's memory has to stay as it is, so it is the rate that falls, and not the direction.
            done = batch.step * passes // ctx.steps.clamp(min=1)  # passes, by every client
            ctx.lr = rate * ((1 + torch.cos(math.pi / passes * done)) / 2)[:, None].to(s)
            d = view.grad(self._masked(frozen, s), batch).mul_(frozen.theta)
            return d if self.key == "signed" else d.mul_(s.sign())

        ctx.message = {"x": self._scores(frozen, ctx.message)}
        s = ctx.descend(direction)
        one = torch.ones(len(s), dtype=torch.float64, device=s.device)  # sums of float32 are exact only up to 2^24
        return ctx.upload(one, {}, {}, **self._ranked(frozen, s))

    def step(self, state: State, reply: Reply, round: int) -> State:
        assert reply.problem is not None
        votes = {name: reputations(reply.mean(name)).double() for name in self.message(state)}
        frozen = network(reply.problem)
        return {"x": self._masked(frozen, self._scores(frozen, votes)), **votes}

    def _vote(self, s: Tensor) -> Tensor:
        """What an edge is ranked by."""
        return s.abs() if self.key == "abs" else s

    def _ranked(self, frozen: Network, s: Tensor) -> Tensors:
        """Each layer's reputations, float64 ``[..., n]``, by the scores ``s`` ``[..., P]``."""
        return {f"ranks.{e.name}": reputations(self._vote(part)).double() for e, part in frozen.each(s)}

    def _scores(self, frozen: Network, votes: Tensors) -> Tensor:
        """Scores ``[..., P]`` out of each layer's reputations ``[..., n]``."""
        some = next(iter(votes.values()))
        s = frozen.scores.new_zeros(*some.shape[:-1], len(frozen.scores))
        for (e, first), (_, part) in zip(frozen.each(self._vote(frozen.scores)), frozen.each(s), strict=True):
            m = first.sort().values
            part.copy_(m[votes[f"ranks.{e.name}"].long()])
        return s

    def _masked(self, frozen: Network, s: Tensor) -> Tensor:
        """The network with the k n_l edges of every layer whose scores ``s`` ``[..., P]`` have the largest keys, ``[..., P]``."""
        w = frozen.theta.expand_as(s).clone()
        for (e, key), (_, part) in zip(frozen.each(s if self.key == "signed" else s.abs()), frozen.each(w), strict=True):
            part.mul_(largest(key, max(1, round(self.k * e.size))))
        return w


@dataclass(frozen=True)
class Network:
    """What everybody draws from the shared seed: ``theta`` and the first ``scores``, each ``[P]``; only ``edges`` have scores."""

    edges: tuple[Entry, ...]
    theta: Tensor
    scores: Tensor

    def each(self, values: Tensor) -> list[tuple[Entry, Tensor]]:
        """Every ranked layer with its part ``[..., n]`` of ``values`` ``[..., P]``."""
        return [(e, values[..., e.start : e.start + e.size]) for e in self.edges]


@lru_cache(maxsize=1)
def network(problem: Problem) -> Network:
    """The frozen network of a problem; kept, because every round needs it."""
    start = problem.start[: problem.shared]
    digest = hashlib.blake2b(start.float().cpu().numpy().tobytes(), digest_size=8).digest()
    streams = Streams(int.from_bytes(digest, "little"), problem.device)
    edges, theta, scores = [], start.clone(), torch.zeros_like(start)
    for place, e in enumerate(problem.shared_layout.entries):
        here, layer = slice(e.start, e.start + e.size), torch.tensor([place])
        if len(e.shape) > 1:
            edges.append(e)
            bound = 1 / math.sqrt(math.prod(e.shape[1:]))
            theta[here] = math.sqrt(2) * bound * (1 - 2 * (streams.words("frl.theta", layer, 0, e.size)[0] & 1))
            scores[here] = bound * (2 * streams.uniform("frl.scores", layer, 0, e.size)[0] - 1)
        elif e.name.rpartition(".")[2] == "bias":
            theta[here] = 0
    return Network(tuple(edges), theta, scores)


def largest(key: Tensor, count: int) -> Tensor:
    """The ``count`` largest of each row of ``key`` ``[..., n]``, of equals the last ones, bool ``[..., n]``."""
    at = key.shape[-1] - count
    if key.device.type == "cpu":  # NumPy's takes a tenth of the time of torch's
        least = torch.from_numpy(np.partition(key.numpy(), at, axis=-1)[..., at : at + 1])
    else:
        least = key.kthvalue(at + 1, keepdim=True).values
    chosen = key >= least
    surplus = chosen.sum(-1, keepdim=True) - count
    if bool(surplus.any()):
        tied = key == least
        chosen &= ~(tied & (tied.cumsum(-1) <= surplus))
    return chosen
