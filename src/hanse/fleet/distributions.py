"""How a quantity is spread over the clients: one number a client, never below 0, a function of (seed, purpose, client)."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import torch
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator
from torch import Tensor

from hanse.core.errors import ConfigError
from hanse.core.part import Part
from hanse.fleet.population import Population

Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class Distribution(Part):
    """Base of all distributions over clients."""

    kind: ClassVar[str] = "distribution"
    abstract: ClassVar[bool] = True

    def draw(self, population: Population, clients: Tensor, purpose: str) -> Tensor:
        """The values of ``clients`` ``[C]``, float64 ``[C]``; the same for a client whoever else is asked about.

        ``purpose`` keys the draws, so that two quantities with one distribution are independent. Raises ``ConfigError`` when the
        distribution does not fit the population.
        """
        raise TypeError(f"{type(self).__name__} does not define draw")


class constant(Distribution):
    """The same for every client."""

    value: NonNegativeFloat
    """The value; inf is allowed."""

    def draw(self, population: Population, clients: Tensor, purpose: str) -> Tensor:
        return torch.full((len(clients),), self.value, dtype=torch.float64)


def _as_distribution(value: Any) -> Any:
    """A number, also as the text in which ``inf`` arrives from a settings file, is a constant."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value
    if number is None or not number >= 0:
        raise ValueError("a number from 0 up, or a distribution, is needed")
    return constant(number)


Amount = Annotated[Distribution, BeforeValidator(_as_distribution)]
"""A distribution, or a number for a constant one."""


class Limits(NamedTuple):
    """What a quantity may be. A constant is checked when it is written down, anything else when it is drawn; nothing is clamped."""

    least: float
    most: float
    said: str
    """What is allowed, in words."""

    def check(self, amount: Distribution) -> Distribution:
        """``amount`` itself; raises ``ValueError`` for a constant outside the limits."""
        if isinstance(amount, constant) and not self.least <= amount.value <= self.most:
            raise ValueError(f"it has to be {self.said}")
        return amount

    def draw(self, amount: Distribution, population: Population, clients: Tensor, purpose: str) -> Tensor:
        """``amount`` drawn, float64 ``[C]``; raises ``ConfigError`` for the first client whose value is outside the limits."""
        values = amount.draw(population, clients, purpose)
        wrong = ~((values >= self.least) & (values <= self.most))
        if wrong.any():
            first = int(wrong.int().argmax())
            drawn = f"{float(values[first]):g}, drawn from {amount} for client {int(clients[first])},"
            raise ConfigError(f"{purpose}: {drawn} is not allowed: it has to be {self.said}")
        return values


CHANCE = Limits(0.0, 1.0, "a probability, from 0 to 1")
FINITE = Limits(0.0, sys.float_info.max, "finite")
POSITIVE = Limits(sys.float_info.min, math.inf, "positive")

Chance = Annotated[Amount, AfterValidator(CHANCE.check)]
"""An amount that is a probability."""
FiniteAmount = Annotated[Amount, AfterValidator(FINITE.check)]
"""An amount that is finite."""
PositiveAmount = Annotated[Amount, AfterValidator(POSITIVE.check)]
"""An amount that is positive, or inf."""


class uniform(Distribution):
    """Anything between two values, all equally likely."""

    low: Finite
    """Least value."""
    high: Finite
    """Greatest value, at least ``low``."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError("high has to be at least low")
        return self

    def draw(self, population: Population, clients: Tensor, purpose: str) -> Tensor:
        return self.low + (self.high - self.low) * population.streams.uniform(purpose, clients)[:, 0]


class lognormal(Distribution):
    """``median * exp(sigma * z)`` with a standard normal z: the usual spread of speeds and rates."""

    median: Positive
    """Median."""
    sigma: Finite
    """Standard deviation of the logarithm."""

    def draw(self, population: Population, clients: Tensor, purpose: str) -> Tensor:
        return self.median * torch.exp(self.sigma * population.streams.normal(purpose, clients)[:, 0])


class exponential(Distribution):
    """Exponential: mostly below the mean, now and then several times as much."""

    mean: Positive
    """Mean, which is the standard deviation as well."""

    def draw(self, population: Population, clients: Tensor, purpose: str) -> Tensor:
        return -self.mean * torch.log(population.streams.uniform(purpose, clients)[:, 0])


class zipf(Distribution):
    """Zipf's law: client i of N has rank i + 1 and gets ``least * (N / (i + 1))^exponent``, or ``most`` if that is less.

    Nothing is drawn: client 0 has the most and client N - 1 exactly ``least``.
    """

    exponent: Finite
    """How steeply values fall with the rank; 0 gives everyone the same, 1 is Zipf's own."""
    least: Positive
    """Value of the last client."""
    most: PositiveFloat = math.inf
    """Upper limit, at least ``least``."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.most < self.least:
            raise ValueError("most has to be at least least")
        return self

    def draw(self, population: Population, clients: Tensor, purpose: str) -> Tensor:
        return (self.least * (population.size / (clients.double() + 1)) ** self.exponent).clamp(max=self.most)


class evenly(Distribution):
    """Evenly spaced from the first client to the last: client i of N gets ``first + (last - first) * i / (N - 1)``.

    ``evenly(1.0, 0.2)`` as the time of a job is scenario F-80 of Fraboni, Vidal, Kameni, Lorenzi, "A General Theory for
    Federated Optimization with Asynchronous and Heterogeneous Clients Updates", JMLR 24(110), 2023: F-X stands for
    ``evenly(1.0, 1 - X / 100)``. A single client gets ``first``.
    """

    first: Finite
    """Value of client 0."""
    last: Finite
    """Value of client N - 1."""

    def draw(self, population: Population, clients: Tensor, purpose: str) -> Tensor:
        return self.first + (self.last - self.first) * clients.double() / max(1, population.size - 1)


class listed(Distribution):
    """A value a client, written down: client i gets the i-th."""

    values: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
    """The values, at least as many as there are clients."""

    def draw(self, population: Population, clients: Tensor, purpose: str) -> Tensor:
        if len(self.values) < population.size:
            raise ConfigError(f"{purpose}: listed holds {len(self.values)} values, but there are {population.size} clients")
        return torch.tensor(self.values, dtype=torch.float64)[clients]


class mixture(Distribution):
    """Several kinds of clients: each belongs to one part, drawn by the shares, and gets a value from it."""

    parts: Annotated[tuple[Amount, ...], Field(min_length=1)]
    """Distributions, or numbers: ``("lognormal(2, 0.4)", "lognormal(10, 0.4)")``."""
    shares: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Share of clients in each part; they are divided by their sum."""

    @model_validator(mode="after")
    def _matched(self) -> Self:
        if len(self.shares) != len(self.parts):
            raise ValueError(f"{len(self.parts)} parts need as many shares, not {len(self.shares)}")
        return self

    def draw(self, population: Population, clients: Tensor, purpose: str) -> Tensor:
        ends = torch.tensor(self.shares, dtype=torch.float64).cumsum(0)
        which = torch.bucketize(population.streams.uniform(f"{purpose}.part", clients)[:, 0] * ends[-1], ends[:-1])
        values = torch.stack([part.draw(population, clients, f"{purpose}.{k}") for k, part in enumerate(self.parts)])
        return values.gather(0, which[None])[0]


def _labels(population: Population, clients: Tensor, purpose: str, user: str) -> Tensor:
    """Share of each class in the samples of ``clients``, float64 ``[C, K]``; a client without samples has zeros."""
    if population.classes is None:
        raise ConfigError(f"{purpose}: {user} needs to know the classes of the clients' samples, and this federation does not")
    counts = population.classes[clients].double()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


class by_class(Distribution):
    """Tied to the data: clients that hold mostly certain classes get another value than the rest.

    A client is inside when at least ``share`` of its training samples are of the named classes taken together. Slow clients that
    own a class are the setting of Wang, Gao, "Tackling the Unlimited Staleness in Federated Learning with Intertwined Data and
    Device Heterogeneities", AAAI 2025, arXiv 2309.13536.
    """

    classes: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Numbers of the classes."""
    inside: Amount
    """What the clients get that hold mostly those classes."""
    outside: Amount
    """What all others get."""
    share: Share = 0.5
    """Least share of samples of those classes that puts a client inside."""

    def draw(self, population: Population, clients: Tensor, purpose: str) -> Tensor:
        labels = _labels(population, clients, purpose, "by_class")
        if max(self.classes) >= labels.shape[1]:
            allowed = f"the data have classes 0 to {labels.shape[1] - 1}"
            raise ConfigError(f"{purpose}: by_class: class {max(self.classes)} is not allowed: {allowed}")
        named = torch.tensor(sorted(set(self.classes)))
        inside = self.inside.draw(population, clients, f"{purpose}.inside")
        outside = self.outside.draw(population, clients, f"{purpose}.outside")
        return torch.where(labels[:, named].sum(1) >= self.share - 1e-12, inside, outside)


class by_labels(Distribution):
    """Tied to the data: rates under which rare clients hold rare classes.

        q ~ Dirichlet(alpha) over the C classes, one for all clients
        p_n = max(least, mean * C * <share of each class at n, q>), at most 1

    Wang, Ji: "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging", ICLR 2024,
    arXiv 2306.03401; numbers of its code. A client without samples gets ``least``.
    """

    mean: Share = 0.1
    """Mean rate over clients, if neither limit binds and classes are equally frequent."""
    alpha: Positive = 0.1
    """How unequal the classes' rates are; less is more unequal."""
    least: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Lower limit."""

    def draw(self, population: Population, clients: Tensor, purpose: str) -> Tensor:
        labels = _labels(population, clients, purpose, "by_labels")
        classes = labels.shape[1]
        q = torch.from_numpy(population.streams.numpy(f"{purpose}.classes").dirichlet([self.alpha] * classes))
        return (self.mean * classes * (labels @ q)).clamp(self.least, 1.0)
