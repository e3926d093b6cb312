"""Optimisers on flat vectors and learning rates over rounds.

An optimiser turns a descent direction into another one; the caller then moves ``x - lr * direction``. The same object serves the
clients (``[C, P]`` rows) and the server (``[P]``, with minus the mean displacement as the direction).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from hanse.core.part import Part

Slots = dict[str, Tensor]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Part):
    """Base of all optimisers."""

    kind: ClassVar[str] = "optimizer"
    abstract: ClassVar[bool] = True

    @property
    def plain(self) -> bool:
        """Whether directions are passed on unchanged."""
        return False

    def slots(self, x: Tensor) -> Slots:
        """Fresh memory for ``x`` ``[..., P]``."""
        return {}

    def direction(self, d: Tensor, slots: Slots, x: Tensor) -> Tensor:
        """The direction to move against; ``slots`` are updated in place, ``d`` may be."""
        raise TypeError(f"{type(self).__name__} does not define direction")


class sgd(Optimizer):
    """Stochastic gradient descent with momentum ``m <- momentum m + d`` and L2 weight decay ``d <- d + weight_decay x``."""

    momentum: Fraction = 0.0
    """Heavy-ball coefficient."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 coefficient, added to the direction."""
    nesterov: bool = False
    """Look ahead along the momentum."""

    @property
    def plain(self) -> bool:
        return not self.momentum and not self.weight_decay

    def slots(self, x: Tensor) -> Slots:
        return {"momentum": torch.zeros_like(x)} if self.momentum else {}

    def direction(self, d: Tensor, slots: Slots, x: Tensor) -> Tensor:
        if self.weight_decay:
            d = d + self.weight_decay * x
        if not self.momentum:
            return d
        m = slots["momentum"].mul_(self.momentum).add_(d)
        return d + self.momentum * m if self.nesterov else m


class adamw(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101): bias-corrected moments and decoupled weight decay."""

    b1: Fraction = 0.9
    """Decay of the first moment."""
    b2: Fraction = 0.999
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay."""

    def slots(self, x: Tensor) -> Slots:
        return {"m": torch.zeros_like(x), "v": torch.zeros_like(x), "t": torch.zeros_like(x[..., :1])}

    def direction(self, d: Tensor, slots: Slots, x: Tensor) -> Tensor:
        t = slots["t"].add_(1)
        m = slots["m"].lerp_(d, 1 - self.b1)
        v = slots["v"].mul_(self.b2).addcmul_(d, d, value=1 - self.b2)
        root = (v / (1 - self.b2**t)).sqrt_().add_(self.eps)
        return m / (1 - self.b1**t) / root + self.weight_decay * x


class adaptive(Optimizer):
    """The server optimisers of FedOpt (Reddi et al., arXiv 2003.00295, Algorithm 2): no bias correction, ``v`` starts at ``tau^2``.

    ``m <- b1 m + (1 - b1) d``; ``v`` by ``second``; direction ``m / (sqrt(v) + tau)``.
    """

    second: Literal["adagrad", "yogi", "adam"] = "adam"
    """adagrad: v + d^2; yogi: v - (1 - b2) d^2 sign(v - d^2); adam: b2 v + (1 - b2) d^2."""
    b1: Fraction = 0.9
    """Decay of the first moment."""
    b2: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Decay of the second moment; 1 keeps it at its start."""
    tau: NonNegativeFloat = 1e-3
    """Degree of adaptivity; also the root of the first ``v``."""

    def slots(self, x: Tensor) -> Slots:
        return {"m": torch.zeros_like(x), "v": torch.full_like(x, self.tau**2)}

    def direction(self, d: Tensor, slots: Slots, x: Tensor) -> Tensor:
        m, v, square = slots["m"].lerp_(d, 1 - self.b1), slots["v"], d.square()
        match self.second:
            case "adagrad":
                v.add_(square)
            case "yogi":
                v.sub_((1 - self.b2) * square * torch.sign(v - square))
            case "adam":
                v.lerp_(square, 1 - self.b2)
        return m / (v.sqrt() + self.tau)


class Rate(Part):
    """Base of all learning rates: a number for every round."""

    kind: ClassVar[str] = "rate"
    abstract: ClassVar[bool] = True

    def at(self, round: int) -> float:
        """The rate in ``round`` (from 0)."""
        raise TypeError(f"{type(self).__name__} does not define at")


class constant(Rate):
    """The same rate in every round."""

    value: PositiveFloat = 0.1
    """The rate."""

    def at(self, round: int) -> float:
        return self.value

    def __str__(self) -> str:
        return repr(self.value)

    full = __str__


class exponential(Rate):
    """``start * decay^round``."""

    start: PositiveFloat = 0.1
    """The rate in round 0."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.998
    """Factor per round."""

    def at(self, round: int) -> float:
        return self.start * self.decay**round


class steps(Rate):
    """``start * factor^(number of milestones passed)``."""

    start: PositiveFloat = 0.1
    """The rate in round 0."""
    milestones: tuple[NonNegativeInt, ...] = ()
    """Rounds at which the rate drops."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What it drops by."""

    def at(self, round: int) -> float:
        return self.start * self.factor ** sum(round >= m for m in self.milestones)


class cosine(Rate):
    """Linear warm-up, then half a cosine from ``start`` to ``end`` at round ``rounds``."""

    start: PositiveFloat = 0.1
    """The highest rate."""
    end: PositiveFloat = 1e-4
    """The rate from round ``rounds`` on."""
    rounds: PositiveInt = 100
    """Length of the curve."""
    warmup: NonNegativeInt = 0
    """Rounds of linear growth before it."""

    def at(self, round: int) -> float:
        if round < self.warmup:
            return self.start * (round + 1) / self.warmup
        share = min(1.0, (round - self.warmup) / max(1, self.rounds - self.warmup))
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * share)) / 2


def _as_rate(value: Any) -> Any:
    return constant(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


LearningRate = Annotated[Rate, BeforeValidator(_as_rate)]
"""A rate, or a number for a constant one."""
