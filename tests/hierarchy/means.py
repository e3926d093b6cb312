"""Updates, their flat mean, and the same by a service."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hanse.hierarchy.service import Aggregation

SIZE = 1000


def updates(clients: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[float]]:
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randint(1, 500, (clients,), generator=draw).double()
    return torch.randn(clients, SIZE, generator=draw, dtype=dtype), weights.tolist()


def flat(x: Tensor, weights: list[float]) -> Tensor:
    return (x.double() * torch.tensor(weights, dtype=torch.float64)[:, None]).sum(0) / sum(weights)


def mean(service: Aggregation, x: Tensor, weights: list[float], turn: list[int] | None = None, order: Any = "arrival") -> Tensor:
    """The mean of one round, in which clients come in ``turn``."""
    round = service.round(len(x), order=order)
    for i in turn or range(len(x)):
        assert round.put(x[i], weights[i], i if order == "place" else None)
    found, weight = round.finish()
    assert weight == sum(weights) and service.needed == 0
    return found


def until(happened: Callable[[], bool]) -> None:
    for _ in range(1000):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it does not happen")
