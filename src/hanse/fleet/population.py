"""Whom a fleet is about: the registered clients, their chance and what their data are."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hanse.core.streams import Streams


class Population(NamedTuple):
    """All registered clients. Devices, links and presence are functions of it, so nothing is stored a client."""

    streams: Streams
    """Where every draw comes from."""
    size: int
    """Number of registered clients."""
    classes: Tensor | None = None
    """Training samples by class, int64 ``[size, K]``; None where classes are unknown or the clients very many."""
