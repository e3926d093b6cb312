"""Peers' programs in virtual time: asyncio with another clock, and the messages between its tasks."""

from __future__ import annotations

import asyncio
import logging
import math
import selectors
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVarTuple

import torch
from torch import Tensor

from hanse.codecs.base import Codec, Sending
from hanse.core.errors import ConfigError, StalledError
from hanse.core.messages import Tensors
from hanse.core.problem import Problem
from hanse.core.streams import Streams
from hanse.core.wire import wire_size
from hanse.federation import Federation
from hanse.fleet.clock import NEVER, SECOND, Clock
from hanse.fleet.profiles import Work
from hanse.schedules.peers import Letter, Node

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What came of a node's training: its model ``[P]``, what a liar adds to it when it sends it, and what the node writes down."""

    x: Tensor
    lie: Tensor | None
    kept: Tensors
    loss: float
    weight: float


Train = Callable[[Tensor, Tensor, Tensor], list[Outcome]]
"""``(nodes int64 [C], models [C, P], rounds int64 [C])``: the rule's work of some nodes, side by side."""


Ts = TypeVarTuple("Ts")

FRUITLESS = 100_000
"""Jumps in time without a round, and a hundredth of it more for every node, after which nothing will come of a run any more."""


class Jump(selectors.DefaultSelector):
    """Waits for nothing: where asyncio would sleep, the clock jumps, ``most`` times at most until somebody sets ``jumps`` back."""

    def __init__(self, clock: Clock, most: float) -> None:
        super().__init__()
        self.clock, self.most, self.jumps = clock, most, 0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise StalledError("no peer will do anything any more: each waits for a message that nobody will send, or has ended")
        if timeout > 0:
            self.jumps += 1
            if self.jumps > self.most:
                raise StalledError(f"the peers go on without a round: {self.clock.now:g} virtual seconds, {self.jumps} events")
            self.clock.go_on(self.clock.time + math.ceil(timeout * SECOND))  # never too early, or who asks again spins
        return []


class Moment(float):
    """A time; of two that are equal the one with the lower number comes first.

    asyncio runs what is due before ``now`` plus a nanosecond. After some months that is ``now`` itself, so it has to be included.
    """

    number = 0

    def __ge__(self, other: float) -> bool:
        return float(self) > float(other)

    def __lt__(self, other: float) -> bool:
        return (float(self), self.number) < (float(other), getattr(other, "number", 0))


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio whose time is the clock's. What is due at the same time runs in the order in which it was asked for."""

    def __init__(self, clock: Clock, most: float = math.inf) -> None:
        self.clock, self.jump, self.asked = clock, Jump(clock, most), 0
        super().__init__(self.jump)

    def time(self) -> float:
        return self.clock.now

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        moment, self.asked = Moment(when), self.asked + 1  # asyncio's heap alone would mix up what is due at the same time
        moment.number = self.asked
        return super().call_at(moment, callback, *args, context=context)


@dataclass(eq=False)
class Job:
    """Training under way: from which model, for which round, and what came of it once that is known."""

    node: int
    x: Tensor
    round: int
    result: Outcome | None = None


@dataclass(eq=False)
class LocalNode:
    """One node's view of the programs it is among."""

    id: int
    programs: Programs
    notes: Tensors = field(default_factory=dict)
    inbox: asyncio.Queue[Letter] = field(default_factory=asyncio.Queue)
    there: bool = False
    free: int = 0
    """When its link has sent everything, nanoseconds."""
    letters: int = 0
    lie: Tensor | None = None
    working: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def nodes(self) -> int:
        return len(self.programs.nodes)

    @property
    def problem(self) -> Problem:
        return self.programs.federation.problem

    @property
    def streams(self) -> Streams:
        return self.programs.streams

    @property
    def now(self) -> float:
        return self.programs.clock.now

    def start(self) -> Tensor:
        self.programs.models[self.id] = self.programs.federation.start(self.id)  # which is what it holds until it says otherwise
        return self.programs.models[self.id].clone()

    def send(self, to: Iterable[int], kind: str, **tensors: Tensor) -> None:
        self.programs.send(self, to, kind, tensors)

    async def receive(self) -> Letter:
        return await self.inbox.get()

    async def train(self, x: Tensor, round: int) -> Tensor:
        return await self.programs.train(self, x, round)

    def publish(self, x: Tensor, round: int) -> None:
        self.programs.publish(x, round)

    def hold(self, x: Tensor) -> None:
        self.programs.hold(self.id, x)


class Programs:
    """All nodes of a run and what is between them.

    ``start`` ``[P]`` is what nodes hold at first. ``train`` does the work of several nodes; it is called when the first result is
    due, for everything under way, and ``trained(node, outcome)`` when a node has its result. ``commit(x)`` ends a round with ``x``,
    the model ``[P]`` of all or the models ``[N, P]``, and says whether the run goes on. ``traffic`` int64 ``[N, 2]`` counts what
    each node sends and receives, bytes; ``counts[kind]`` messages and bytes by kind.
    """

    def __init__(
        self,
        federation: Federation,
        clock: Clock,
        streams: Streams,
        codec: Codec,
        traffic: Tensor,
        work: Callable[[Tensor], Work],
        train: Train,
        trained: Callable[[int, Outcome], None],
        commit: Callable[[Tensor], bool],
        start: Tensor,
    ) -> None:
        if federation.fleet.trace.counts_rounds:
            raise ConfigError(
                f"fleet: {federation.fleet.trace} is not allowed with peers that share no rounds: give it slots of seconds"
            )
        self.federation, self.clock, self.streams, self.codec, self.traffic = federation, clock, streams, codec, traffic
        self._work, self._train, self._trained, self._commit = work, train, trained, commit
        self.round, self.held, self.start, self.latest = 0, 0, start, start
        self.jobs: list[Job] = []
        self.counts: dict[str, list[int]] = {}
        self.nodes = [LocalNode(i, self) for i in range(federation.clients)]

    def play(self, program: Callable[[Node], Coroutine[Any, Any, None]], seconds: float) -> None:
        """Run every node's ``program`` until ``commit`` says that it is over, or until ``seconds``."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._play(program, seconds)
        else:  # as in a notebook; a thread has one loop at a time
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self._play, program, seconds).result()

    def _play(self, program: Callable[[Node], Coroutine[Any, Any, None]], seconds: float) -> None:
        self.loop = VirtualLoop(self.clock, FRUITLESS * (1 + len(self.nodes) / 100))
        try:
            self.loop.run_until_complete(self._all(program, seconds))
        finally:
            self.loop.run_until_complete(_cancelled(asyncio.all_tasks(self.loop)))
            self.loop.close()

    async def _all(self, program: Callable[[Node], Coroutine[Any, Any, None]], seconds: float) -> None:
        self.over = self.loop.create_future()
        if math.isfinite(seconds):
            self.loop.call_at(seconds, self._time_is_up)
        lives = [asyncio.create_task(self._live(node, program)) for node in self.nodes]
        for life in lives:
            life.add_done_callback(self._ended)
        await self.over

    def _end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def _time_is_up(self) -> None:
        """What there is by then is a round of its own, whoever is not done."""
        if not self.over.done():
            self._commit(self.models.clone() if "models" in self.__dict__ else self.latest)
            self._end()

    def _ended(self, life: asyncio.Task[None]) -> None:
        error = None if life.cancelled() else life.exception()
        while isinstance(error, BaseExceptionGroup):  # of the tasks that a program had started
            error = error.exceptions[0]
        if error is not None and not self.over.done():
            self.over.set_exception(error)

    async def _live(self, node: LocalNode, program: Callable[[Node], Coroutine[Any, Any, None]]) -> None:
        trace, population, me = self.federation.fleet.trace, self.federation.population, torch.tensor([node.id])
        while math.isfinite(back := float(trace.back(population, me, self.clock.now))):
            await asyncio.sleep(back - self.clock.now)
            gone = float(trace.gone(population, me, self.clock.now))
            node.inbox, node.there = asyncio.Queue(), True
            task = asyncio.create_task(program(node))
            await asyncio.wait({task}, timeout=gone - self.clock.now if math.isfinite(gone) else None)
            over = task.done()
            task.cancel()
            await asyncio.wait({task})  # what it still sends are its last words
            node.there = False
            if over or not task.cancelled():
                return task.result()
        return None

    # ---- messages

    def send(self, sender: LocalNode, to: Iterable[int], kind: str, tensors: Tensors) -> None:
        """See ``Node.send``. A link carries one message after the other; latencies and losses of both ends add up."""
        if not sender.there or self.over.done():
            return
        own = {name: t.clone() for name, t in tensors.items()}  # what the program does with them afterwards is its own affair
        to, (told, size) = list(to), self._coded(sender, kind, own)
        for receiver in to:
            if receiver == sender.id:
                self._deliver(receiver, Letter(sender.id, kind, own), 0)
                continue
            sender.letters += 1
            self._count(sender.id, 0, size)
            counted = self.counts.setdefault(kind, [0, 0])
            counted[0], counted[1] = counted[0] + 1, counted[1] + size
            at = self._arrival(sender, receiver, size)
            lost = self._drawn("letter.loss", sender, receiver, "loss")
            copies = 0 if lost else 1 + self._drawn("letter.twice", sender, receiver, "duplicates")
            for _ in range(copies):
                self.loop.call_at(at, self._deliver, receiver, Letter(sender.id, kind, told), size)

    def _coded(self, sender: LocalNode, kind: str, tensors: Tensors) -> tuple[Tensors, int]:
        """What arrives of a message, and its bytes; the codec has the models, which are called ``x``."""
        if sender.lie is not None and "x" in tensors:
            tensors = {**tensors, "x": tensors["x"] + sender.lie}
        named = {f"{kind}.{name}": t for name, t in tensors.items()}
        if self.codec.plain or "x" not in tensors:
            return tensors, wire_size(named)
        seeds = self.streams.seeds("codec.letter", torch.tensor([sender.id]), sender.letters)
        sent = self.codec.roundtrip(tensors["x"][None].clone(), Sending(self.federation.problem.shared_layout, seeds))
        del named[f"{kind}.x"]
        return {**tensors, "x": sent.values[0]}, wire_size(named, {f"{kind}.x": int(sent.sizes)})

    def _count(self, node: int, way: int, size: int) -> None:
        self.traffic[node, way] += size
        if way == 0:
            self.clock.up += size

    @cached_property
    def _links(self) -> dict[str, list[float]] | None:
        profile = self.clock.profile(torch.arange(len(self.nodes)))
        return (
            None
            if profile is None
            else {name: getattr(profile, name).tolist() for name in ("up", "down", "latency", "loss", "duplicates")}
        )

    def _arrival(self, sender: LocalNode, receiver: int, size: int) -> float:
        if self._links is None:
            return self.clock.now
        up, down, latency = (self._links[name] for name in ("up", "down", "latency"))
        sender.free = max(sender.free, self.clock.time) + math.ceil(size / up[sender.id] * SECOND)
        return sender.free / SECOND + latency[sender.id] + latency[receiver] + size / down[receiver]

    def _drawn(self, purpose: str, sender: LocalNode, receiver: int, chance: str) -> int:
        """1 if it happens to this message, which it does if it happens at either end."""
        if self._links is None or not (both := [self._links[chance][i] for i in (sender.id, receiver)]) or not any(both):
            return 0
        u = self.streams.uniform(purpose, torch.tensor([sender.id]), sender.letters, extra=receiver)
        return int(float(u) < 1 - (1 - both[0]) * (1 - both[1]))

    def _deliver(self, receiver: int, letter: Letter, size: int) -> None:
        node, x = self.nodes[receiver], letter.tensors.get("x")
        if not node.there:
            return
        self._count(receiver, 1, size)
        if x is not None and not bool(x.isfinite().all()):
            said = "node %d refuses what node %d sent: it is not finite"
            log.warning(said, receiver, letter.sender, extra={"client": letter.sender})
        else:
            node.inbox.put_nowait(letter)

    # ---- work

    async def train(self, node: LocalNode, x: Tensor, round: int) -> Tensor:
        """See ``Node.train``. A node does one thing after the other; what it gives up leaves it as it was."""
        async with node.working:
            me = torch.tensor([node.id])
            job, done = Job(node.id, x.clone(), round), int(self.clock.finish(me, self._work(me))[0][0])
            self.jobs.append(job)
            try:
                await (asyncio.sleep((done - self.clock.time) / SECOND) if done < NEVER else self.loop.create_future())
                if job.result is None:
                    self._execute()
            finally:
                self.jobs.remove(job)
            assert job.result is not None
            node.lie = job.result.lie
            self._trained(node.id, job.result)
            return job.result.x

    def _execute(self) -> None:
        """Everything under way, whoever waits for it: side by side it costs less."""
        due = [job for job in self.jobs if job.result is None]
        nodes, rounds = torch.tensor([job.node for job in due]), torch.tensor([job.round for job in due])
        for job, result in zip(due, self._train(nodes, torch.stack([job.x for job in due]), rounds), strict=True):
            job.result = result

    # ---- rounds

    @cached_property
    def models(self) -> Tensor:
        """What every node holds, ``[N, P]``."""
        return self.start.repeat(len(self.nodes), 1)

    def publish(self, x: Tensor, round: int) -> None:
        """See ``Node.publish``."""
        if round > self.round and not self.over.done():
            self.round, self.latest, self.loop.jump.jumps = round, x, 0
            if not self._commit(x):
                self._end()

    def hold(self, node: int, x: Tensor) -> None:
        """See ``Node.hold``."""
        self.models[node] = x
        self.held, self.loop.jump.jumps = self.held + 1, 0
        if self.held % len(self.nodes) == 0 and not self.over.done() and not self._commit(self.models.clone()):
            self._end()


async def _cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
