"""Peers that are programs of their own: no round that all share, only messages, time-outs, and nodes that come and go.

A program is an ordinary ``asyncio`` coroutine that reads like the node's algorithm box. It sleeps with ``asyncio.sleep``, gives up
with ``asyncio.timeout``, works on several things with ``asyncio.TaskGroup``, and otherwise asks its ``Node``; so it runs in virtual
time, where ``asyncio`` has another clock, as on real processes. It must draw chance from ``node.streams`` and never iterate over a
set of tasks, whose order is not the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from hanse.core.errors import ConfigError
from hanse.core.messages import Tensors
from hanse.core.problem import Problem
from hanse.core.streams import Streams
from hanse.methods.base import Method
from hanse.schedules.network import Network, Schedule


class Letter(NamedTuple):
    """A message that has arrived: who sent it, what it is, and what is in it."""

    sender: int
    kind: str
    tensors: Tensors


class Node(Protocol):
    """What one peer's program may ask for. ``notes`` are what it has on its disk: they outlast its going away."""

    id: int
    notes: Tensors

    @property
    def nodes(self) -> int:
        """Number of registered nodes."""
        ...

    @property
    def problem(self) -> Problem:
        """Model, loss and metrics."""
        ...

    @property
    def streams(self) -> Streams:
        """All chance."""
        ...

    @property
    def now(self) -> float:
        """Seconds since the start, virtual or not."""
        ...

    def start(self) -> Tensor:
        """Initial weights ``[P]`` that this node draws for itself."""
        ...

    def send(self, to: Iterable[int], kind: str, **tensors: Tensor) -> None:
        """Send a message to each of ``to``, one after the other. It may be lost; nobody says so. To oneself it costs nothing."""
        ...

    async def receive(self) -> Letter:
        """The next message."""
        ...

    async def train(self, x: Tensor, round: int) -> Tensor:
        """What the rule makes of the model ``x`` ``[P]`` on this node's data, in ``round``, from 0; it can be cancelled."""
        ...

    def publish(self, x: Tensor, round: int) -> None:
        """There is a model ``[P]`` for all, of ``round`` (counted from 1); the first of each round counts."""
        ...

    def hold(self, x: Tensor) -> None:
        """This node's own model is now ``x`` ``[P]``; where nobody publishes, a round is one of these for every node."""
        ...


class Peers(Schedule):
    """Base of schedules whose nodes run programs. Such a run cannot be saved in the middle: resumed, it is played again."""

    abstract: ClassVar[bool] = True
    replayed: ClassVar[bool] = True

    async def live(self, node: Node) -> None:
        """One node's program, from when it comes until it goes away, when it is cancelled and may send last words, but not wait;
        called again when it is back.
        """
        raise TypeError(f"{type(self).__name__} does not define live")

    async def run(self, net: Network, method: Method) -> None:
        begin(net, method, f"{type(self).__name__}")
        await net.play(self.live)


def begin(net: Network, method: Method, schedule: str) -> Tensor:
    """The initial model; raises ``ConfigError`` on a rule that needs a server to remember something."""
    if net.problem.shares_buffers:
        raise ConfigError(
            f"buffers: 'average' is not allowed with {schedule}: nodes exchange no batch-norm statistics; use 'private'"
        )
    state = method.init(net.problem)
    if method.opens or state.keys() != {"x"}:
        needs = ", ".join(sorted(state.keys() - {"x"})) or "to hear from everybody first"
        raise ConfigError(f"method: {method} is not allowed with {schedule}: it has a server that needs {needs}")
    state, _ = net.begin(state)
    return state["x"]
