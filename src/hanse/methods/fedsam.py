"""FedSAM: local steps with the gradient at the worst point near by, so that models lie in flat regions, where averaging harms less.

Qu, Li, Duan, Liu, Tang, Lu: "Generalized Federated Learning via Sharpness Aware Minimization", ICML 2022, arXiv 2206.02618; as the
local rule of DFedSAM and DFedSAM-MGS (under the schedule ``gossip``) Shi et al., ICML 2023, arXiv 2302.04083.

    g = grad F_i(y; xi);   delta = rho g / (||g||_2 + 1e-12);   y <- y - lr grad F_i(y + delta; xi)

One norm over all parameters together, the same samples twice. Weight decay and momentum belong to the step, not to delta; running
statistics are those of the first pass. rho = 0 is FedAvg bit for bit. Sent and kept: as FedAvg.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeFloat
from torch import Tensor

from hanse.core.context import Context
from hanse.core.samples import Batch
from hanse.methods.fedavg import FedAvg

TINY = 1e-12


class FedSAM(FedAvg):
    """FedAvg with sharpness-aware local steps."""

    gradients: ClassVar[int] = 2

    rho: NonNegativeFloat = 0.05
    """Radius of the perturbation."""

    def direction(self, ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        g = ctx.grad(w, batch)
        return g if not self.rho else ctx.grad(w + g * (self.rho / (g.norm(dim=1, keepdim=True) + TINY)), batch)
