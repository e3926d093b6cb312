"""What a conversation may ask for. An engine provides it; a schedule never sees a socket, a clock or a thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from hanse.core.messages import Reply, Tensors
from hanse.core.part import Part
from hanse.core.problem import Problem
from hanse.core.streams import Streams
from hanse.fleet.clock import Events, Jobs
from hanse.methods.base import Method, State
from hanse.topologies import Mixing


class Network(Protocol):
    """The other side of a schedule: clients to ask, and a place to commit to.

    Work under way belongs to the network, not to the schedule: a schedule remembers only its state and its notes, and both only
    from one ``commit`` to the next. So a loop that commits once, at its end, goes on identically after a kill.
    """

    problem: Problem
    streams: Streams
    clients: int
    """Number of registered clients."""
    round: int
    """Rounds committed so far, which is the version of the model."""

    @property
    def now(self) -> float:
        """Virtual seconds, or those since the start."""
        ...

    @property
    def out(self) -> Jobs:
        """Jobs under way."""
        ...

    @property
    def arrived(self) -> Jobs:
        """Replies that have arrived and were not collected, in order of arrival."""
        ...

    def begin(self, state: State, notes: Tensors | None = None) -> tuple[State, Tensors]:
        """What to start from: ``state`` and ``notes`` in a new run, what was committed in a resumed one."""
        ...

    def going(self) -> bool:
        """Whether there are rounds still to do."""
        ...

    def sample(self, k: int) -> Tensor:
        """``k`` distinct clients drawn uniformly from those that are there and not at work, or all if they are fewer; sorted."""
        ...

    def there(self, clients: Tensor) -> Tensor:
        """Who of ``clients`` can be reached now, bool ``[C]``."""
        ...

    @property
    def counts(self) -> Tensor:
        """Number of samples of every registered client, int64."""
        ...

    @property
    def total_weight(self) -> float:
        """Sum of the rule's averaging weights over all registered clients."""
        ...

    def send(
        self,
        clients: Tensor,
        work: str,
        message: Tensors,
        steps: Tensor | None = None,
        patience: float = math.inf,
        parts: Tensor | None = None,
    ) -> None:
        """Have ``clients``, none of them at work, do the rule's ``work``, in ``steps`` ``[C]`` local steps if given.

        After ``patience`` seconds a job without a reply is given up. ``parts`` float64 ``[C]`` is how much of the message's vectors
        each client gets, as a rule's ``parts`` says.
        """
        ...

    async def wait(self, replies: int = 1, until: float = math.inf, anyone: bool = False) -> Events:
        """Wait for ``replies`` more replies, or as many as can come, or until a job is given up, a rest is over, the time ``until``
        has come or, with ``anyone``, a client that is away comes back. Returns at once if none of these can happen.
        """
        ...

    def collect(self, jobs: Jobs, scale: Tensor | None = None, total: float | None = None) -> Reply:
        """Take replies that have arrived, as one; ``scale`` ``[len(jobs)]`` and ``total`` as in ``Reply``."""
        ...

    def call_off(self, jobs: Jobs) -> None:
        """Tell the clients of these jobs to stop; nothing comes of them, and those of them that have arrived are thrown away."""
        ...

    def rest(self, clients: Tensor, seconds: Tensor) -> None:
        """Be woken for each of ``clients`` after so many seconds, ``[C]``."""
        ...

    async def ask(self, clients: Tensor, work: str, message: Tensors, parts: Tensor | None = None) -> Reply:
        """Have ``clients`` do the rule's ``work`` and wait for all who will reply: ``send``, ``wait`` and ``collect`` in one, but
        without a row a client at the server.
        """
        ...

    def starts(self) -> Tensor:
        """Initial models ``[N, P]`` as if every client had drawn its own."""
        ...

    async def work(self, nodes: Tensor, work: str, message: Tensors, patience: float = math.inf) -> Reply:
        """Have ``nodes`` do the rule's ``work``, each from its own row of ``message`` (of ``len(nodes)`` rows): nothing travels.

        Those not done after ``patience`` seconds are left out; all others reply, and ``mean`` leaves each of them its own. Whatever
        the work, it takes as long as training does; only training counts as an update.
        """
        ...

    async def exchange(self, models: Tensor, mixing: Mixing, before: Tensor | None) -> tuple[Tensor, Mixing]:
        """``before`` are the models before their last training, which says what liars have to lie about.

        Every node sends its row of ``models`` ``[N, P]`` to its neighbours; what they have of it, and the weights left."""
        ...

    async def play(self, program: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        """Have every node run its own ``program``, given its ``Node``, until there are no more rounds to do."""
        ...

    async def commit(self, state: State, notes: Tensors | None = None) -> None:
        """End the round: everything needed to go on from here is now safe to save."""
        ...


class Schedule(Part):
    """Base of all schedules: a coroutine that reads like the algorithm box of its paper."""

    kind: ClassVar[str] = "schedule"
    abstract: ClassVar[bool] = True
    replayed: ClassVar[bool] = False
    """Whether what goes on cannot be saved in the middle, so that a run which is resumed starts over, and comes to the same."""
    barrier: ClassVar[bool] = False
    """Whether those who are asked together are added up together, before anybody else is asked."""

    def sampling(self) -> tuple[int, Literal["fixed", "bernoulli"]] | None:
        """Expected number of clients a round, and how they are drawn, if each round is one ``ask`` and nothing but that chance
        decides who counts in it; else None. It is what an accountant of privacy has to know.
        """
        return None

    async def run(self, net: Network, method: Method) -> None:
        """The whole conversation."""
        raise TypeError(f"{type(self).__name__} does not define run")


async def start(net: Network, method: Method, notes: Tensors | None = None) -> tuple[State, Tensors]:
    """How every conversation begins: the state and notes to start from, and the clients' opening work if the rule has some."""
    state, notes = net.begin(method.init(net.problem), notes)
    if method.opens and net.round == 0:
        everyone = torch.arange(net.clients)
        reply = await net.ask(everyone[net.there(everyone)], "open", method.message(state))
        state = method.opened(state, reply) if len(reply) else state
    return state, notes


async def occupy(net: Network, cohort: int, message: Tensors, patience: float) -> Events | None:
    """Have up to ``cohort`` clients at work and wait until something happens; None if nothing can."""
    free, before = net.sample(cohort - len(net.out)), net.now
    if len(free):
        net.send(free, "train", message, patience=patience)
    events = await net.wait(anyone=len(net.out) < cohort)
    return events if len(events.arrived) or net.now > before else None
