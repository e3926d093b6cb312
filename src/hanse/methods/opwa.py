"""OPWA: overlap-aware weights of parameters, for sparse updates.

Tang, Huang, Yan, Wang, Tang, Shi, Zhou, Chu: "Bandwidth-Aware and Overlap-Weighted Compression for Communication-Efficient
Federated Learning", ICPP 2024, arXiv 2408.14736.

    o_j = number of clients in S that sent entry j
    g_j = gamma   if 1 <= o_j <= r, else 1
    x_j <- x_j + g_j sum_{i in S} p_i d_ij                    p_i = n_i / sum_{S} n, d_ij = 0 where i did not send j

An entry that one of |S| clients sends is divided by |S| in plain averaging; gamma undoes that. ``normalised`` is our addition,
the weighted mean over those who sent an entry, without a parameter: g_j = 1 / sum_{i that sent j} p_i.

Goes with any codec that leaves entries out; ``bcrs`` is the paper's. Without one it is FedAvg. The paper's ranges of gamma and r
are not known to us: r = 1 and gamma = |S|, at most 10, are our choice. The paper also lets a client's weight grow with its share;
in a pilot that was worse than leaving the weights alone, and it is left out.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from hanse.core.messages import Reply
from hanse.methods.base import State
from hanse.methods.fedavg import FedAvg

CAP = 10.0
"""Largest gamma that is taken from the size of the cohort."""


class OPWA(FedAvg):
    """FedAvg in which entries that few clients sent are not averaged away."""

    masks: ClassVar[bool] = True

    gamma: Annotated[float, Field(ge=1)] | None = None
    """Factor on entries that at most ``overlap`` clients sent; None: the number of clients, at most 10. One client alone: 1."""
    overlap: PositiveInt = 1
    """The threshold r."""
    weighting: Literal["enlarged", "normalised"] = "enlarged"
    """enlarged: gamma; normalised: the mean over those who sent an entry."""

    def step(self, state: State, reply: Reply, round: int) -> State:
        delta = reply.mean("delta")
        return self.move(state, reply, delta * self.factor(reply) if "delta.kept" in reply.sums else delta)

    def factor(self, reply: Reply) -> Tensor:
        """g ``[P]``."""
        if self.weighting == "normalised":
            sent = reply.sums["delta.kept"] / reply.weight.sum()  # unscaled, or a schedule's discounts would cancel
            return torch.where(sent > 0, 1 / sent, 1)
        few = reply.sums["delta.overlap"].round() <= self.overlap
        gamma = 1.0 if len(reply) == 1 else self.gamma or min(float(len(reply)), CAP)
        return torch.where(few, gamma, 1.0)
