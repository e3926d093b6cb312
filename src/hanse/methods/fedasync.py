"""FedAsync: the server moves towards the client's model, not along its displacement.

Xie, Koyejo, Gupta: "Asynchronous Federated Optimization", arXiv 1903.03934, Algorithm 1.

    client:     minimises F_i(w) + (mu/2) |w - x_rho|^2 from x_rho;   x_i is where it ends
    server:     x <- (1 - alpha_n) x + alpha_n x_i,    alpha_n = alpha s(n - rho)          from the schedule ``fedasync``

Under another schedule x moves by sum_i omega_i (x_i - x), omega_i being what the schedule counts the contribution with; under
``synchronous`` it is FedProx. Sent: down x, up x_i. Kept: nothing.
"""

from __future__ import annotations

from pydantic import NonNegativeFloat

from hanse.aggregators import mean
from hanse.core.context import Context
from hanse.core.messages import Reply, Upload
from hanse.methods.base import PlainMean, State
from hanse.methods.fedprox import FedProx


class FedAsync(FedProx):
    """FedProx that mixes models."""

    mu: NonNegativeFloat = 0.0
    """Weight of the proximal term; 0 leaves it out."""
    aggregate: PlainMean = mean()
    """The mean."""

    def train(self, ctx: Context) -> Upload:
        return ctx.upload(self.weigh(ctx), model=ctx.descend(self.direction))

    def step(self, state: State, reply: Reply, round: int) -> State:
        share = float(reply.shares.sum())
        return self.move(state, reply, reply.mean("model").sub_(state["x"], alpha=share))
