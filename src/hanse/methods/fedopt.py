"""Adaptive and momentum optimisers at the server: FedAvg with another ``server``.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan: "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295,
Algorithm 2; and for the heavy ball Hsu, Qi, Brown: "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", arXiv 1909.06335. With Delta = sum_i w_i Delta_i / sum_i w_i of FedAvg, per coordinate:

    m <- b1 m + (1 - b1) Delta
    FedAdagrad  v <- v + Delta^2
    FedYogi     v <- v - (1 - b2) Delta^2 sign(v - Delta^2)
    FedAdam     v <- b2 v + (1 - b2) Delta^2
    x <- x + server_lr * m / (sqrt(v) + tau)                     start m = 0, v = tau^2; no bias correction

    FedAvgM     u <- b u + Delta;   x <- x + server_lr * u

Averaged batch-norm statistics bypass the optimiser. Sent: as FedAvg. Kept: m and v (or u) at the server, nothing at the clients.
The steps of the adaptive rules have about the length ``server_lr`` in every coordinate, so it wants tuning: the paper tries powers
of ten, and of tau those from 1e-5 to 1e-1. FedAvgM, momentum at the server, is not ``FedAvg_M``, momentum at the clients.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hanse.core.optim import Optimizer, adaptive, sgd
from hanse.methods.fedavg import FedAvg


class FedAdagrad(FedAvg):
    """FedAvg with Adagrad at the server."""

    server: Optimizer = adaptive(second="adagrad", b1=0.0)
    """Server optimiser, on minus the averaged displacement."""
    server_lr: Annotated[float, Field(gt=0)] = 0.03
    """Server learning rate."""


class FedYogi(FedAvg):
    """FedAvg with Yogi at the server."""

    server: Optimizer = adaptive(second="yogi")
    """Server optimiser, on minus the averaged displacement."""
    server_lr: Annotated[float, Field(gt=0)] = 0.01
    """Server learning rate."""


class FedAdam(FedAvg):
    """FedAvg with Adam at the server."""

    server: Optimizer = adaptive(second="adam")
    """Server optimiser, on minus the averaged displacement."""
    server_lr: Annotated[float, Field(gt=0)] = 0.01
    """Server learning rate."""


class FedAvgM(FedAvg):
    """FedAvg with heavy-ball momentum at the server."""

    server: Optimizer = sgd(momentum=0.9)
    """Server optimiser, on minus the averaged displacement."""
