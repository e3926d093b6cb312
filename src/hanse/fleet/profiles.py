"""How fast the clients' devices and links are, in virtual seconds.

A profile is a function of (seed, client), so a fleet of a million devices is no larger than the clients asked about.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from hanse.core.part import Part
from hanse.fleet.distributions import CHANCE, FINITE, POSITIVE, Amount, Chance, FiniteAmount, Limits, PositiveAmount, constant
from hanse.fleet.population import Population
from hanse.fleet.traces import Trace, always


class Work(NamedTuple):
    """What some clients are asked to do, each ``[C]``."""

    steps: Tensor
    """Local steps."""
    flops: Tensor
    """Floating-point operations."""
    memory: float
    """Bytes a client needs while it trains."""


class Profile(NamedTuple):
    """Devices and links of some clients, each float64 ``[C]``."""

    flops: Tensor
    """Training speed in floating-point operations per second."""
    memory: Tensor
    """Bytes of memory."""
    step: Tensor
    """Seconds a local step takes whatever the model."""
    job: Tensor
    """Seconds a whole job takes whatever the model and the steps."""
    down: Tensor
    """Bytes per second from the server."""
    up: Tensor
    """Bytes per second to the server."""
    latency: Tensor
    """Seconds for a message one way."""
    loss: Tensor
    """Probability that a reply never arrives."""
    duplicates: Tensor
    """Probability that a reply arrives twice."""
    paging: Tensor = torch.ones(1, dtype=torch.float64)
    """How many times slower work would run without any memory; 1: memory is never short."""

    def compute(self, work: Work) -> Tensor:
        """Seconds of computing at full speed, float64 ``[C]``.

        Work that needs more memory than there is runs ``1 + (paging - 1) * (1 - memory / need)`` times slower, job and steps
        included. That is our choice: the part of the work that does not fit runs ``paging`` times slower.
        """
        short = torch.where(self.memory < work.memory, 1 - self.memory / work.memory, 0.0)
        return (1 + (self.paging - 1) * short) * (self.job + self.step * work.steps + work.flops / self.flops)


class Fleet(Part):
    """Base of all fleets. A fleet says what clients' devices and links are, and its trace when they are there."""

    kind: ClassVar[str] = "fleet"
    abstract: ClassVar[bool] = True
    trace: Trace = always()
    """When clients are there, and how fast they are then."""

    def profile(self, population: Population, clients: Tensor) -> Profile | None:
        """The devices of ``clients``; None where everything is instantaneous."""
        raise TypeError(f"{type(self).__name__} does not define profile")


class ideal(Fleet):
    """Every device and link is infinitely fast: virtual time stands still.

    With a trace that counts rounds it is the fleet for experiments about participation: ``ideal(trace=bernoulli(0.1))``.
    """

    def profile(self, population: Population, clients: Tensor) -> Profile | None:
        return None


class devices(Fleet):
    """Devices and links put together by hand; what is not said costs no time.

    Every field is a number for all clients or a distribution over them: ``devices(step="evenly(0.1, 0.4)", up=5)``. Each has draws
    of its own, so that saying one more thing never changes another.
    """

    gflops: PositiveAmount = constant(math.inf)
    """Training speed of a core, 1e9 floating-point operations per second."""
    cores: PositiveAmount = constant(1)
    """Cores that work at it; the speeds of all add up."""
    memory: Amount = constant(math.inf)
    """Memory, GB (1e9 bytes)."""
    step: FiniteAmount = constant(0)
    """Seconds a local step takes whatever the model, beside its arithmetic."""
    job: FiniteAmount = constant(0)
    """Seconds a whole job takes whatever the model and the steps."""
    down: PositiveAmount = constant(math.inf)
    """From the server, Mbit/s."""
    up: PositiveAmount = constant(math.inf)
    """To the server, Mbit/s."""
    latency: FiniteAmount = constant(0)
    """Seconds for a message one way."""
    loss: Chance = constant(0)
    """Probability that a reply never arrives."""
    duplicates: Chance = constant(0)
    """Probability that a reply arrives twice."""
    paging: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0
    """How many times slower work would run on a device without any memory; see ``Profile.compute``."""

    def profile(self, population: Population, clients: Tensor) -> Profile | None:
        def drawn(name: str, limits: Limits) -> Tensor:
            return limits.draw(getattr(self, name), population, clients, f"fleet.{name}")

        megabit = 1e6 / 8
        return Profile(
            flops=drawn("gflops", POSITIVE) * drawn("cores", POSITIVE) * 1e9,
            memory=self.memory.draw(population, clients, "fleet.memory") * 1e9,
            step=drawn("step", FINITE),
            job=drawn("job", FINITE),
            down=drawn("down", POSITIVE) * megabit,
            up=drawn("up", POSITIVE) * megabit,
            latency=drawn("latency", FINITE),
            loss=drawn("loss", CHANCE),
            duplicates=drawn("duplicates", CHANCE),
            paging=torch.full((len(clients),), self.paging, dtype=torch.float64),
        )
