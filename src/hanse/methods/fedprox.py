"""FedProx: a proximal term that keeps local models near the global one.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127.

    direction:  grad F_i(w; e) + mu * (w - x)

mu = 0 is FedAvg. Sent and kept: as FedAvg.
"""

from __future__ import annotations

from pydantic import NonNegativeFloat
from torch import Tensor

from hanse.core.context import Context
from hanse.core.samples import Batch
from hanse.methods.fedavg import FedAvg


class FedProx(FedAvg):
    """FedAvg with a proximal term."""

    mu: NonNegativeFloat = 0.01
    """Strength of the proximal term; the paper tries 0.001, 0.01, 0.1 and 1."""

    def direction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        return ctx.grad(w, batch) + self.mu * (w - ctx.start)
