"""Weights that make a schedule without a barrier unbiased: every client counts by how rarely it delivers.

Fraboni, Vidal, Kameni, Lorenzi: "A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients Updates",
JMLR 24(110), 2023, arXiv 2206.10189: aggregation n adds sum_i omega_i(n) Delta_i, and the limit is the minimiser of
sum_i p_i F_i exactly when E[omega_i] is proportional to the importance p_i. With constant speeds that is omega_i = p_i times the
number of aggregations between two deliveries of client i, which is how the paper's table reads for all four of its schedules.

Here that period is measured rather than known (our choice): its moving mean needs no clock, holds for every schedule, and equals
the table where speeds are constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hanse.core.messages import Tensors

MEMORY = 0.9
"""Weight of the old mean."""


def unknown_periods(clients: int) -> Tensors:
    """Notes of a schedule that has seen nobody yet, ``[clients]`` each."""
    return {"period": torch.zeros(clients, dtype=torch.float64), "seen": torch.full((clients,), -1)}


def measured(notes: Tensors, clients: Tensor, versions: Tensor, n: int) -> tuple[Tensors, Tensor]:
    """New notes, and the mean period ``[C]`` of each of ``clients``, who started from ``versions`` and deliver to round ``n``.

    The first period of a client is that of the job itself. One that delivers several times at once shares its period among them.
    """
    period, seen = notes["period"].clone(), notes["seen"].clone()
    first = seen[clients] < 0
    _, place, times = torch.unique(clients, return_inverse=True, return_counts=True)
    gap = (n - torch.where(first, versions - 1, seen[clients])).double() / times[place]
    new = torch.where(first, gap, MEMORY * period[clients] + (1 - MEMORY) * gap)
    period[clients], seen[clients] = new, n
    return {"period": period, "seen": seen}, new
