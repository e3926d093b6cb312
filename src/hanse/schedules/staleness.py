"""How much an update counts that started from an old model: functions of its staleness u, the versions committed since.

constant and hinge and polynomial are those of Xie, Koyejo, Gupta: "Asynchronous Federated Optimization", arXiv 1903.03934,
section 5.2. All are 1 at u = 0 and never rise.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from hanse.core.part import Part


class Staleness(Part):
    """Base of all staleness weights: callable on ``u`` ``[C]``."""

    kind: ClassVar[str] = "staleness"
    abstract: ClassVar[bool] = True

    def __call__(self, u: Tensor) -> Tensor:
        """float64 ``[C]``, at most 1."""
        raise TypeError(f"{type(self).__name__} does not define __call__")


class constant(Staleness):
    """s(u) = 1."""

    def __call__(self, u: Tensor) -> Tensor:
        return torch.ones(u.shape, dtype=torch.float64)


class polynomial(Staleness):
    """s(u) = (1 + u)^-a."""

    a: NonNegativeFloat = 0.5
    """Exponent."""

    def __call__(self, u: Tensor) -> Tensor:
        return (1.0 + u.double()) ** -self.a


class hinge(Staleness):
    """s(u) = 1 if u <= b, else 1 / (a (u - b) + 1)."""

    a: PositiveFloat = 10.0
    """How fast it falls."""
    b: NonNegativeFloat = 4.0
    """Staleness that still counts in full."""

    def __call__(self, u: Tensor) -> Tensor:
        return 1 / (self.a * (u.double() - self.b).clamp(min=0) + 1)


class halving(Staleness):
    """s(u) = 2^(-u / every)."""

    every: PositiveFloat = 20.0
    """Versions after which an update counts half."""

    def __call__(self, u: Tensor) -> Tensor:
        return 2.0 ** (-u.double() / self.every)


def discounted(staleness: Staleness, u: Tensor, oldest: int | None) -> Tensor:
    """``s(u)``, and 0 beyond ``oldest``, float64 ``[C]``."""
    return staleness(u) if oldest is None else torch.where(u <= oldest, staleness(u), 0.0)
