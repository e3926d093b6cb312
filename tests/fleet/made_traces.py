"""A trace written down slot by slot, and the plainest way to follow any trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from hanse.core.streams import Streams
from hanse.fleet import Population, Slotted


class written(Slotted):
    """Speeds by client and slot, over and over again."""

    abstract: ClassVar[bool] = True  # of the tests, so not to be found by its name
    speeds: tuple[tuple[float, ...], ...]
    """A row a client."""

    def level(self, population: Population, clients: Tensor, slots: Tensor) -> Tensor:
        table = torch.tensor(self.speeds, dtype=torch.float64)[clients]
        return table.gather(1, slots % table.shape[1])


def people(size: int, seed: int = 0) -> Population:
    return Population(Streams(seed), size)


def by_the_second(speed: Callable[[int], float], start: int, seconds: float, lost: bool, horizon: int) -> tuple[float, bool]:
    """When work is done, and whether it is broken, for speeds that change at whole seconds only."""
    for second in range(start, horizon):
        fast = speed(second)
        if fast == 0 and lost:
            return second, True
        if fast >= seconds:
            return second + seconds / fast, False
        seconds -= fast
    return math.inf, False
