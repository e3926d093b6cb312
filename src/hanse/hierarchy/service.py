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
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hanse.core.errors import ConfigError, TransportError
from hanse.core.layout import Layout
from hanse.hierarchy import plan
from hanse.hierarchy.events import SIZE, Event, Kind, unpack
from hanse.hierarchy.node import Node, Worker
from hanse.hierarchy.plan import Role
from hanse.hierarchy.round import Round
from hanse.hierarchy.store import RESULTS, UPDATES, Store, Stored
from hanse.hierarchy.task import Task

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
    """Seconds that aggregators have been there, summed over those that have been seen to end."""


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
        if not 0 < idle < math.inf:
            raise ConfigError(f"idle: {idle}; allowed: more than 0, finite")
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
        self.nodes = [Node(i, Store(i, self.size, dtypes, updates, results)) for i in range(nodes)]

    def __enter__(self) -> Aggregation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all aggregators and remove all shared memory; results that were given out stay valid."""
        self._end([w for node in self.nodes for w in node.workers])
        self._selector.close()
        for node in self.nodes:
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
        self.pump(0)  # see who has ended meanwhile
        # There is one round at a time, so nothing queues when it begins.
        assigned, _ = plan.best_fit(self.capacity, [0] * len(self.nodes), expected)
        for node in self.nodes:
            node.arrived, node.done, node.busy = 0, 0, 0.0
            if node.queue is not None and node.number in assigned:
                planned = min(self.workers, plan.leaves(node.queue, self.fan_in))
                for _ in range(planned - len(node.workers)):  # those that are too many end by themselves
                    self._start(node)
        self._round = Round(self, assigned, order, deadline)
        return self._round

    def lend(self, node: int = 0) -> Stored:
        """Memory on a node for an update, to be filled here or, by its ``name``, by another process, and handed in to a round.

        Waits until there is room; raises ``TransportError`` if only an update that is still missing could make any.
        """
        store = self.nodes[node].store
        while store.full(UPDATES) and any(w.task and w.task.whole for n in self.nodes for w in n.workers):
            self.pump(None)
        return store.take(UPDATES)

    def pump(self, timeout: float | None) -> None:
        """Take in what aggregators have said, waiting up to ``timeout`` seconds for the first of it (None: as long as it takes)."""
        for key, _ in self._selector.select(timeout):
            worker: Worker = key.data
            if worker in worker.node.workers:
                (self._receive if key.fileobj is worker.data else self._hear)(worker)
        for node in self.nodes:
            self._dispatch(node)

    def move(self, task: Task) -> None:
        """Have a task go on with a new input, or begin, if it can."""
        if task.worker is not None:
            self._tell(task.worker, task.news())
            return
        # What waits for other aggregators begins when all is there: it might hold the process that one of them needs.
        begins = task.whole or (self.eager and task.role is Role.LEAF and 0 in task.inputs and bool(task.present))
        if begins and task not in task.node.waiting:
            task.node.waiting.append(task)
        self._dispatch(task.node)

    def give_away(self, result: Stored) -> Tensor:
        """A result's memory; aggregators that have mapped it let go of it."""
        for worker in self.nodes[result.store.node].workers:
            self._tell(worker, [result.event(Kind.FORGET)])
        return result.store.give_away(result)

    def end_round(self, seconds: float) -> None:
        """There is a result, or nothing to make one of, after ``seconds`` of arrivals."""
        self._round = None
        for node in self.nodes:
            node.estimate(seconds)

    def give_up(self) -> None:
        """End the round without a result: nobody works for it any more, and nothing of it is needed."""
        assert self._round is not None
        self._end([w for node in self.nodes for w in node.workers if w.task is not None])
        for task in self._round.tasks:
            task.drop()
        for node in self.nodes:
            node.waiting.clear()
        self._round = None

    def _dispatch(self, node: Node) -> None:
        """Give waiting tasks to idle aggregators, complete ones first; start one if there is none and may be one more."""
        while node.waiting:
            task = next((t for t in node.waiting if t.whole), node.waiting[0])
            idle = [w for w in node.workers if w.task is None]
            chosen = plan.choose([w.role for w in idle], task.role)
            if chosen is None and len(node.workers) >= self.workers:
                return
            worker = self._start(node) if chosen is None else idle[chosen]
            task.out, task.fed, task.received = task.where.take(RESULTS), 0, 0
            node.waiting.remove(task)
            self.counters.promotions += chosen is not None and task.role in (Role.MIDDLE, Role.TOP) and worker.role < task.role
            worker.role, worker.task, task.worker = task.role, task, worker
            if task.role is Role.SENDER:
                self._selector.register(worker.data, selectors.EVENT_READ, worker)
            self._tell(worker, task.news())

    def _start(self, node: Node) -> Worker:
        worker = Worker(node, self.idle)
        self._selector.register(worker.control, selectors.EVENT_READ, worker)
        node.workers.append(worker)
        self.counters.starts += 1
        return worker

    def _tell(self, worker: Worker, events: Sequence[Event]) -> None:
        self.counters.events += len(events)
        worker.tell(events)

    def _hear(self, worker: Worker) -> None:
        """An aggregator has finished a mean, or has ended."""
        data = b""
        with suppress(ConnectionError):
            data = worker.control.recv(SIZE, socket.MSG_WAITALL)
        if len(data) < SIZE:
            self._lost(worker)
            return
        (event,) = unpack(data)
        self.counters.events += 1
        worker.node.done += 1
        worker.node.busy += event.number * 1e-9
        self._finished(worker, event.weight)

    def _receive(self, worker: Worker) -> None:
        """More of another node's result has come; it is written where it will be read."""
        task = worker.task
        assert task is not None and task.out is not None
        memory = task.out.values.view(torch.uint8).numpy().data
        got = 0
        with suppress(ConnectionError):
            got = worker.data.recv_into(memory[task.received :])
        if not got:
            self._lost(worker)
            return
        task.received += got
        self.counters.inter_bytes += got
        if task.received == len(memory):
            self._selector.unregister(worker.data)
            self._finished(worker, task.present[0].weight)

    def _finished(self, worker: Worker, weight: float) -> None:
        task, worker.task = worker.task, None
        assert task is not None and task.out is not None and self._round is not None
        result, task.out = task.out, None
        result.weight = weight
        task.drop()
        self._round.arrive(task.parent, task.slot, result)

    def _lost(self, worker: Worker) -> None:
        """An aggregator has ended: idle, or killed over a task, whose inputs are all still there."""
        self._forget(worker)
        task = worker.task
        if task is None:
            return
        assert task.out is not None
        task.out.release()
        task.out, task.worker, task.attempts = None, None, task.attempts + 1
        task.node.waiting.insert(0, task)
        self.counters.redone += 1
        if task.attempts >= ATTEMPTS:
            status = worker.process.returncode
            raise TransportError(f"aggregators: {task.attempts} have ended over the same task, the last with {status}")

    def _forget(self, worker: Worker) -> None:
        with suppress(KeyError):
            self._selector.unregister(worker.data)
        self._selector.unregister(worker.control)
        worker.control.close()
        worker.data.close()
        worker.process.wait()
        worker.node.workers.remove(worker)
        self.counters.node_seconds += time.monotonic() - worker.born

    def _end(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            self._forget(worker)
