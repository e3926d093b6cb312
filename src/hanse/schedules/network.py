"""What a conversation may ask for. An engine provides it; a schedule never sees a socket, a clock or a thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Protocol

from torch import Tensor

from hanse.core.messages import Reply, Tensors
from hanse.core.part import Part
from hanse.core.problem import Problem
from hanse.core.streams import Streams
from hanse.methods.base import Method, State


class Network(Protocol):
    """The other side of a schedule: clients to ask, and a place to commit to."""

    problem: Problem
    streams: Streams
    clients: int
    """Number of registered clients."""

    def begin(self, state: State) -> State:
        """The state to start from: ``state`` in a new run, the committed one in a resumed run."""
        ...

    def rounds(self) -> Iterator[int]:
        """The rounds still to do."""
        ...

    def sample(self, k: int) -> Tensor:
        """``k`` distinct clients for this round, drawn uniformly, sorted."""
        ...

    async def ask(self, clients: Tensor, work: str, message: Tensors) -> Reply:
        """Have the clients run the rule's method called ``work`` and wait for all of them."""
        ...

    async def commit(self, state: State) -> None:
        """End the round: everything needed to go on from here is now safe to save."""
        ...


class Schedule(Part):
    """Base of all schedules: a coroutine that reads like the algorithm box of its paper."""

    kind: ClassVar[str] = "schedule"
    abstract: ClassVar[bool] = True

    def expected_cohort(self) -> int:
        """Clients at work at a time, for estimates made before a run."""
        raise TypeError(f"{type(self).__name__} does not define expected_cohort")

    async def run(self, net: Network, method: Method) -> None:
        """The whole conversation."""
        raise TypeError(f"{type(self).__name__} does not define run")
