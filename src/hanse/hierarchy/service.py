"""A server's weighted mean by a tree of aggregators that start when something arrives and are reused: no copies, bounded memory.

    with Aggregation(size=1_000_000) as service:
        round = service.round(expected=100)
        for update, samples in arriving:
            round.put(update, samples)
        mean, weight = round.finish()

What decides the result. Updates have places, 0 to expected - 1: those of their arrival, or, under ``order="place"``, given ones.
The tree follows from the number expected, ``fan_in``, ``workers``, ``nodes`` and ``capacity``, and inputs are added in the order of
the places. So the same values, weights and places give the same bits, however fast anybody was and whoever was killed. Under
``order="arrival"`` another order changes the last bits of the sums: float32's, or with ``accumulate="float64"`` float64's.

The service has no thread of its own: it moves on whenever it is called. Aggregators go on by themselves with what they were given.
"""

from __future__ import annotations

import math
import os
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hanse.core.errors import ConfigError, HanseError, TransportError
from hanse.core.layout import Layout
from hanse.hierarchy import plan
from hanse.hierarchy.events import SIZE, Event, Kind, unpack
from hanse.hierarchy.plan import Role
from hanse.hierarchy.store import RESULTS, UPDATES, Store, Stored

DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
ATTEMPTS = 3
"""How many aggregators may end over the same task before it is given up."""


@dataclass
class Counters:
    """What a service has done since it was made."""

    starts: int = 0
    promotions: int = 0
    redone: int = 0
    """Tasks begun again because an aggregator had ended."""
    late: int = 0
    """Updates thrown away because their round was over."""
    copies: int = 0
    """Vectors copied into shared memory within a machine."""
    copied_bytes: int = 0
    events: int = 0
    """Events through sockets, 24 bytes each."""
    inter_bytes: int = 0
    """Bytes of results that travelled between nodes."""
    node_seconds: float = 0.0
    """Seconds that aggregators have lived, summed over those that ended."""


@dataclass(eq=False)
class _Worker:
    """An aggregator's process, as the service sees it."""

    node: _Node
    process: subprocess.Popen[bytes]
    control: socket.socket
    data: socket.socket
    born: float
    role: Role = Role.LEAF
    task: _Task | None = None


@dataclass(eq=False)
class _Task:
    """A step of the tree: its inputs as far as they are known (None: will not come), and who works on it."""

    node: _Node
    role: Role
    inputs: list[Stored | None]
    parent: _Task | None
    slot: int
    known: list[bool]
    missing: int
    queued: bool = False
    worker: _Worker | None = None
    out: Stored | None = None
    told: int = 0
    fed: int = 0
    sent: int = 0
    received: int = 0
    attempts: int = 0

    @property
    def present(self) -> list[Stored]:
        """The inputs that have come."""
        return [s for s in self.inputs if s is not None]


@dataclass(eq=False)
class _Node:
    """A store, the aggregators beside it, the tasks that wait for one, and what the sidecar has measured."""

    number: int
    store: Store
    workers: list[_Worker] = field(default_factory=list)
    waiting: deque[_Task] = field(default_factory=deque)
    queue: float | None = None
    arrived: int = 0
    done: int = 0
    busy: float = 0.0


class Aggregation:
    """Means of vectors of ``size`` numbers (or of a ``Layout``), round after round, on ``nodes`` nodes, all on this machine.

    ``workers`` is the most aggregators a node has, by default the cores divided by the nodes; ``fan_in`` (I) the updates that one
    adds before the result is safe; ``capacity`` (MC) the updates that a node takes before the next one is opened, by default all.
    ``budget`` is bytes of shared memory a node, by default what its aggregators can hold and as much again. After ``idle`` seconds
    without work an aggregator ends (T_idle); with ``eager=False`` it begins when all of its inputs are there.

    Raises ``ConfigError`` on settings that cannot be.
    """

    def __init__(
        self,
        size: int | Layout,
        *,
        dtype: str = "float32",
        accumulate: Literal["float32", "float64"] = "float32",
        nodes: int = 1,
        workers: int | None = None,
        fan_in: int = 4,
        capacity: int | Sequence[int] | None = None,
        budget: int | None = None,
        idle: float = 5.0,
        eager: bool = True,
    ) -> None:
        self.layout = size if isinstance(size, Layout) else None
        self.size = self.layout.size if self.layout else int(size)  # type: ignore[arg-type]
        workers = max(1, (os.cpu_count() or 1) // max(nodes, 1)) if workers is None else workers
        for name, value in (("size", self.size), ("nodes", nodes), ("workers", workers)):
            if value < 1:
                raise ConfigError(f"{name}: {value}; allowed: 1 or more")
        if fan_in < 2:
            raise ConfigError(f"fan_in: {fan_in}; allowed: 2 or more")
        if dtype not in DTYPES or accumulate not in ("float32", "float64"):
            raise ConfigError(f"dtype, accumulate: {dtype}, {accumulate}; allowed: {', '.join(DTYPES)}; float32, float64")
        self.capacity = [sys.maxsize if capacity is None else capacity] * nodes if isinstance(capacity, int | None) else [*capacity]
        if len(self.capacity) != nodes or min(self.capacity) < 0:
            raise ConfigError(f"capacity: {self.capacity}; allowed: a number from 0, or one for each of {nodes} nodes")
        self.workers, self.fan_in, self.idle, self.eager = workers, fan_in, idle, eager
        self.counters = Counters()
        dtypes = DTYPES[dtype], DTYPES[accumulate]
        # A leaf's last result and its next; the middle's; on the top's node, one from each other node and the last.
        results = 2 * workers + 1 + nodes
        updates = 2 * fan_in * workers
        if budget is not None:
            most = budget - results * self.size * dtypes[RESULTS].itemsize
            updates = most // (self.size * dtypes[UPDATES].itemsize)
            if updates < fan_in:
                least = budget - most + fan_in * self.size * dtypes[UPDATES].itemsize
                raise ConfigError(
                    f"budget: {budget:,}; allowed: {least:,} bytes or more with {workers} workers and fan_in {fan_in}"
                )
        self._selector = selectors.DefaultSelector()
        self._round: Round | None = None
        self.nodes: list[_Node] = []
        try:
            for i in range(nodes):
                self.nodes.append(_Node(i, Store(i, self.size, dtypes, updates, results)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Aggregation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all aggregators and remove all shared memory; results that were given out stay valid."""
        workers = [w for node in self.nodes for w in node.workers]
        for worker in workers:
            worker.control.close()
            worker.data.close()
        for worker in workers:
            try:
                worker.process.wait(5)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            self.counters.node_seconds += time.monotonic() - worker.born
        self._selector.close()
        for node in self.nodes:
            node.workers.clear()
            node.store.close()

    @property
    def aggregators(self) -> list[int]:
        """Process numbers of the aggregators that live."""
        return [w.process.pid for node in self.nodes for w in node.workers]

    @property
    def needed(self) -> int:
        """Vectors in shared memory that somebody still needs: 0 after a round."""
        return sum(len(node.store.stored) for node in self.nodes)

    @property
    def peak_bytes(self) -> int:
        """Bytes of shared memory taken at most, over all nodes."""
        return sum(node.store.peak_bytes for node in self.nodes)

    def round(self, expected: int, *, order: Literal["arrival", "place"] = "arrival", deadline: float | None = None) -> Round:
        """A round of ``expected`` updates, which takes none any more after ``deadline`` seconds."""
        if expected < 1:
            raise ConfigError(f"expected: {expected}; allowed: 1 or more")
        if order not in ("arrival", "place"):
            raise ConfigError(f"order: {order!r}; allowed: arrival, place")
        if self._round is not None:
            raise ConfigError("round: the last one is not finished")
        # There is one round at a time, so nothing queues when it begins.
        assigned, _ = plan.best_fit(self.capacity, [0] * len(self.nodes), expected)
        for node in self.nodes:
            node.arrived, node.done, node.busy = 0, 0, 0.0
            if node.queue is not None and node.number in assigned:
                planned = min(self.workers, plan.leaves(node.queue, self.fan_in))
                for _ in range(plan.difference(planned, len(node.workers))):
                    self._start(node)
        self._round = Round(self, assigned, order, deadline)
        return self._round

    def lend(self, node: int = 0) -> Stored:
        """Memory on a node for an update, to be filled here or, by its ``name``, by another process, and handed in to a round.

        Waits until there is room; raises ``TransportError`` if only an update that is still missing could make any.
        """
        store = self.nodes[node].store
        while store.full(UPDATES) and any(w.task and not w.task.missing for n in self.nodes for w in n.workers):
            self._pump(None)
        return store.take(UPDATES)

    def _pump(self, timeout: float | None) -> None:
        """Take in what aggregators have said, waiting up to ``timeout`` seconds for the first of it (None: as long as it takes)."""
        for key, _ in self._selector.select(timeout):
            worker: _Worker = key.data
            if worker not in worker.node.workers:
                continue
            if key.fileobj is worker.data:
                self._receive(worker)
            else:
                self._hear(worker)
        for node in self.nodes:
            self._dispatch(node)

    def _start(self, node: _Node) -> _Worker:
        mine, theirs = zip(socket.socketpair(), socket.socketpair(), strict=True)
        shelves = [
            text
            for shelf in (UPDATES, RESULTS)
            for text in (str(node.store.dtypes[shelf]).removeprefix("torch."), str(node.store.shelves[shelf].folder))
        ]
        fds = [s.fileno() for s in theirs]
        command = [sys.executable, "-m", "hanse.hierarchy.aggregator", *map(str, (*fds, self.idle, self.size)), *shelves]
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, env={**os.environ, **one})
        for s in theirs:
            s.close()
        worker = _Worker(node, process, *mine, born=time.monotonic())
        self._selector.register(worker.control, selectors.EVENT_READ, worker)
        node.workers.append(worker)
        self.counters.starts += 1
        return worker

    def _hear(self, worker: _Worker) -> None:
        """An aggregator has finished a mean, or has ended."""
        data = b""
        with suppress(ConnectionError):
            data = worker.control.recv(SIZE, socket.MSG_WAITALL)
        if len(data) < SIZE:
            self._lost(worker)
            return
        (event,) = unpack(data)
        task = worker.task
        assert task is not None and task.out is not None
        self.counters.events += 1
        worker.node.done += 1
        worker.node.busy += event.number * 1e-9
        task.out.weight = event.weight
        self._finished(task)

    def _receive(self, worker: _Worker) -> None:
        """More of another node's result has come; it is written where it will be read."""
        task = worker.task
        assert task is not None and task.out is not None
        memory = task.out.values.view(torch.uint8).numpy().data
        try:
            got = worker.data.recv_into(memory[task.received :])
        except ConnectionError:
            got = 0
        if not got:
            self._lost(worker)
            return
        task.received += got
        self.counters.inter_bytes += got
        if task.received == len(memory):
            self._selector.unregister(worker.data)
            task.out.weight = task.present[0].weight
            self._finished(task)

    def _finished(self, task: _Task) -> None:
        assert task.worker is not None
        task.worker.task = None
        for used in task.present:
            used.release()
        self._deliver(task, task.out)

    def _lost(self, worker: _Worker) -> None:
        """An aggregator has ended: idle, or killed over a task, whose inputs are all still there."""
        with suppress(KeyError):
            self._selector.unregister(worker.data)
        self._selector.unregister(worker.control)
        worker.control.close()
        worker.data.close()
        worker.process.wait()
        worker.node.workers.remove(worker)
        self.counters.node_seconds += time.monotonic() - worker.born
        if worker.task is None:
            return
        task, worker.task = worker.task, None
        assert task.out is not None
        task.out.release()
        task.out, task.worker, task.attempts = None, None, task.attempts + 1
        self.counters.redone += 1
        if task.attempts == ATTEMPTS:
            raise TransportError(
                f"aggregators: {ATTEMPTS} have ended over the same task, the last with {worker.process.returncode}"
            )
        task.queued = True
        task.node.waiting.appendleft(task)

    def _arrive(self, task: _Task, slot: int, stored: Stored | None) -> None:
        """An update is there, or is known not to come (None)."""
        if self._over(task, slot, stored):
            self._deliver(task, next(iter(task.present), None))

    def _deliver(self, task: _Task, result: Stored | None) -> None:
        """Hand a task's result on, past all tasks that have nothing to add to it."""
        while task.parent is not None:
            slot, task = task.slot, task.parent
            if not self._over(task, slot, result):
                return
            result = next(iter(task.present), None)
        assert self._round is not None
        self._round.result, self._round.over = result, True

    def _over(self, task: _Task, slot: int, stored: Stored | None) -> bool:
        """Take an input in, and give it to an aggregator if one is needed; True if a single input, or none, is the result."""
        task.inputs[slot], task.known[slot] = stored, True
        task.missing -= 1
        if task.worker is not None:
            self._feed(task)
            return False
        present = task.present
        if not task.missing and (not present or (len(present) == 1 and self._passes(task, present[0]))):
            if task.queued:
                task.node.waiting.remove(task)
            return True
        # What waits for other aggregators begins when all is there: it might hold the process that one of them needs.
        begins = not task.missing or (self.eager and task.role is Role.LEAF and task.known[0] and bool(present))
        if begins and not task.queued:
            task.queued = True
            task.node.waiting.append(task)
        self._dispatch(task.node)
        return False

    def _passes(self, task: _Task, only: Stored) -> bool:
        """Whether a single input is the result as it is: not if it has to travel, nor if results are of another type."""
        same = only.shelf == RESULTS or only.store.dtypes[UPDATES] is only.store.dtypes[RESULTS]
        return task.role is not Role.SENDER and same and only.references == 1

    def _dispatch(self, node: _Node) -> None:
        """Give waiting tasks to idle aggregators, complete ones first; start one if there is none and may be one more."""
        while node.waiting:
            task = next((t for t in node.waiting if not t.missing), node.waiting[0])
            idle = [w for w in node.workers if w.task is None]
            chosen = plan.choose([w.role for w in idle], task.role)
            if chosen is None and len(node.workers) >= self.workers:
                return
            worker = self._start(node) if chosen is None else idle[chosen]
            node.waiting.remove(task)
            task.queued = False
            self.counters.promotions += chosen is not None and task.role in (Role.MIDDLE, Role.TOP) and worker.role < task.role
            worker.role, worker.task, task.worker = task.role, task, worker
            store = task.parent.node.store if task.role is Role.SENDER and task.parent else node.store
            task.out = store.take(RESULTS)
            task.fed = task.sent = task.received = 0
            if task.role is Role.SENDER:
                self._selector.register(worker.data, selectors.EVENT_READ, worker)
                (result,) = task.present
                self._tell(worker, [Event(Kind.SEND, result.shelf, result.place, result.number, result.weight)])
            else:
                task.told = task.missing + len(task.present)
                self._feed(task, [Event(Kind.START, RESULTS, task.out.place, task.out.number, task.told)])

    def _feed(self, task: _Task, events: Sequence[Event] = ()) -> None:
        """Tell the task's aggregator of the inputs whose turn it is."""
        events = [*events]
        while task.fed < len(task.inputs) and task.known[task.fed]:
            new = task.inputs[task.fed]
            task.fed += 1
            if new is not None:
                task.sent += 1
                events.append(Event(Kind.INPUT, new.shelf, new.place, new.number, new.weight))
        if task.fed == len(task.inputs) and task.sent < task.told:
            events.append(Event(Kind.CLOSE))
        assert task.worker is not None
        self._tell(task.worker, events)

    def _tell(self, worker: _Worker, events: Sequence[Event]) -> None:
        self.counters.events += len(events)
        with suppress(ConnectionError):  # it has ended; its socket says so when it is read
            worker.control.sendall(b"".join(event.pack() for event in events))

    def _took(self, result: Stored) -> Tensor:
        """The result's memory, given away; aggregators that have mapped it let go of it."""
        for worker in self.nodes[result.store.node].workers:
            self._tell(worker, [Event(Kind.FORGET, result.shelf, result.place)])
        return result.store.give_away(result)


class Round:
    """One mean: updates are put or handed in until it is finished. Made by ``Aggregation.round``."""

    def __init__(self, service: Aggregation, assigned: list[int], order: str, deadline: float | None) -> None:
        self.service, self.order = service, order
        self.began = time.monotonic()
        self.ends = math.inf if deadline is None else self.began + deadline
        self.nodes = assigned
        """The node of every place."""
        self.over = self.closed = False
        self.result: Stored | None = None
        self._task: list[tuple[_Task, int]] = [None] * len(assigned)  # type: ignore[list-item]
        self._plan()
        self._open = dict.fromkeys(range(len(assigned)))
        self._free = {n: deque(p for p, node in enumerate(assigned) if node == n) for n in set(assigned)}

    def _plan(self) -> None:
        """Make the tree's tasks, from the top down."""
        service, used, last = self.service, sorted(set(self.nodes)), None
        if len(used) > 1:
            last = _task(service.nodes[plan.top(self.nodes)], Role.TOP, len(used), None, 0)
        for i, number in enumerate(used):
            node, parent, slot = service.nodes[number], last, i
            if last is not None and node is not last.node:
                parent, slot = _task(node, Role.SENDER, 1, last, i), 0
            mine = [p for p, n in enumerate(self.nodes) if n == number]
            steps, places = plan.tree(len(mine), service.fan_in, service.workers)
            tasks: dict[int, _Task] = {}
            for s in range(len(steps) - 1, -1, -1):  # parents come after their children
                step = steps[s]
                above = (parent, slot) if step.parent == plan.OUT else (tasks[step.parent], step.slot)
                tasks[s] = _task(node, step.role, step.inputs, *above)
            for p, (s, slot_) in zip(mine, places, strict=True):
                self._task[p] = tasks[s], slot_

    @property
    def late(self) -> bool:
        """Whether it takes no more: it is finished, full, or past its deadline."""
        return self.closed or not self._open or time.monotonic() >= self.ends

    def put(self, update: Tensor | Mapping[str, Tensor], weight: float = 1.0, place: int | None = None) -> bool:
        """Copy an update ``[size]`` (or, with a layout, its named tensors) into shared memory; False if it is late and was dropped.

        Waits while the store is full. Raises ``ConfigError`` on a wrong shape, type, weight or place.
        """
        self._check(weight, place)
        if self.late:
            self.service.counters.late += 1
            return False
        room = self.service.lend(self.nodes[next(iter(self._open)) if place is None else place])
        try:
            self._copy(update, room.values)
        except BaseException:
            room.release()
            raise
        self.service.counters.copies += 1
        self.service.counters.copied_bytes += room.values.nbytes
        return self.hand_in(room, weight, place)

    def hand_in(self, room: Stored, weight: float = 1.0, place: int | None = None, keep: bool = False) -> bool:
        """Take the update in memory that ``lend`` gave, without a copy; False if it is late and was dropped.

        With ``keep`` the memory stays the caller's too, who releases it in the end and does not change it before the round is over.
        """
        self._check(weight, place)
        node = room.store.node
        if place is not None and self.nodes[place] != node:
            raise ConfigError(f"place: {place} is on node {self.nodes[place]}; allowed: those on node {node}, where the update is")
        if room.references > 1 and weight not in (0, room.weight):
            raise ConfigError(f"weight: {weight}; allowed: {room.weight}, with which the same memory was handed in before")
        free = self._free.get(node, deque())
        if self.late or (place is None and not free):
            self.service.counters.late += 1
            if not keep:
                room.release()
            return False
        if place is None:
            place = free.popleft()
        del self._open[place]
        task, slot = self._task[place]
        task.node.arrived += 1
        if not weight:
            if not keep:
                room.release()
            self.service._arrive(task, slot, None)
        else:
            room.weight = weight
            room.references += keep
            self.service._arrive(task, slot, room)
        self.service._pump(0)
        return True

    def finish(self, out: Tensor | None = None) -> tuple[Tensor, float]:
        """The weighted mean of what has arrived, ``[size]`` in the type of accumulation, and the sum of the weights.

        The mean is the shared memory that it was written to, or ``out`` if given. Raises ``HanseError`` if nothing with a weight
        has arrived.
        """
        if self.closed:
            raise ConfigError("round: it has been finished")
        self.closed = True
        seconds = max(time.monotonic() - self.began, 1e-9)
        for place in self._open:
            task, slot = self._task[place]
            self.service._arrive(task, slot, None)
        while not self.over:
            self.service._pump(None)
        self.service._round = None
        for node in self.service.nodes:
            each = node.busy / max(node.done, 1)
            node.queue = plan.smoothed(node.queue, node.arrived / seconds, each)
        if self.result is None:
            raise HanseError("round: nothing with a weight has arrived")
        result, weight = self.result, self.result.weight
        if out is None:
            return self.service._took(result), weight
        out.copy_(result.values)
        result.release()
        return out, weight

    def _check(self, weight: float, place: int | None) -> None:
        if not 0 <= weight < math.inf:
            raise ConfigError(f"weight: {weight}; allowed: 0 or more, finite")
        if (place is None) == (self.order == "place"):
            raise ConfigError(f"place: {place}; allowed: {'a number' if place is None else 'none'} with order={self.order!r}")
        if place is not None and not (0 <= place < len(self.nodes) and (place in self._open or self.closed)):
            raise ConfigError(f"place: {place}; allowed: each number from 0 to {len(self.nodes) - 1} once")

    def _copy(self, update: Tensor | Mapping[str, Tensor], into: Tensor) -> None:
        if isinstance(update, Tensor):
            wanted, given = {"update": into}, {"update": update}
        elif self.service.layout is None:
            raise ConfigError("update: named tensors; allowed: a vector, where the service was made with a size and no layout")
        else:
            wanted, given = self.service.layout.views(into), {**update}
        for name in {**wanted, **given}:
            if name not in wanted or name not in given or given[name].shape != wanted[name].shape:
                got = tuple(given[name].shape) if name in given else "nothing"
                raise ConfigError(f"{name}: {got}; allowed: {tuple(wanted[name].shape) if name in wanted else 'nothing'}")
            if given[name].dtype is not into.dtype:
                raise ConfigError(f"{name}: {given[name].dtype}; allowed: {into.dtype}, which can be averaged as it is")
            # NumPy's copy goes past the cache, which torch's does not: it takes a sixth less time.
            np.copyto(wanted[name].numpy(), given[name].detach().cpu().numpy())


def _task(node: _Node, role: Role, inputs: int, parent: _Task | None, slot: int) -> _Task:
    return _Task(node, role, [None] * inputs, parent, slot, [False] * inputs, inputs)
