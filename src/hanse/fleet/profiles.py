"""How fast the clients' devices and links are, in virtual seconds.

A profile is a function of (seed, client), so a fleet of a million devices is no larger than the clients asked about.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from hanse.core.part import Part
from hanse.core.streams import Streams


class Profile(NamedTuple):
    """Devices and links of some clients, each float64 ``[C]``."""

    flops: Tensor
    """Training speed in floating-point operations per second."""
    down: Tensor
    """Bytes per second from the server."""
    up: Tensor
    """Bytes per second to the server."""
    latency: Tensor
    """Seconds for a message one way."""

    def seconds(self, flops: Tensor, bytes_down: int, bytes_up: Tensor) -> Tensor:
        """From the server's sending to its receiving the reply: transfer down, compute, transfer up."""
        return 2 * self.latency + bytes_down / self.down + flops / self.flops + bytes_up / self.up


class Fleet(Part):
    """Base of all fleets."""

    kind: ClassVar[str] = "fleet"
    abstract: ClassVar[bool] = True

    def profile(self, streams: Streams, clients: Tensor) -> Profile | None:
        """The devices of ``clients``; None where everything is instantaneous."""
        raise TypeError(f"{type(self).__name__} does not define profile")


class ideal(Fleet):
    """Every device and link is infinitely fast: virtual time stands still."""

    def profile(self, streams: Streams, clients: Tensor) -> Profile | None:
        return None


class phones(Fleet):
    """Slow and fast phones on mobile links: two classes of devices, log-normal spread within each.

    The defaults are round figures for sustained single-precision training on a phone's processor and for mobile links, meant
    for comparing rules on one fleet rather than for predicting a product's speed.
    """

    slow: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of slow phones."""
    gflops_slow: PositiveFloat = 2.0
    """Median speed of a slow phone."""
    gflops_fast: PositiveFloat = 10.0
    """Median speed of a fast phone."""
    down_mbit: PositiveFloat = 20.0
    """Median download rate, megabits per second."""
    up_mbit: PositiveFloat = 5.0
    """Median upload rate, megabits per second."""
    latency: Annotated[float, Field(ge=0)] = 0.05
    """Seconds one way."""
    spread: Annotated[float, Field(ge=0)] = 0.4
    """Standard deviation of the logarithm of speeds and rates."""

    def profile(self, streams: Streams, clients: Tensor) -> Profile | None:
        slow = streams.uniform("fleet.class", clients)[:, 0] < self.slow
        factor = torch.exp(self.spread * streams.normal("fleet.spread", clients, n=3))
        median = torch.where(slow, self.gflops_slow, self.gflops_fast).double() * 1e9
        byte = 1e6 / 8
        latency = torch.full_like(median, self.latency)
        return Profile(median * factor[:, 0], self.down_mbit * byte * factor[:, 1], self.up_mbit * byte * factor[:, 2], latency)
