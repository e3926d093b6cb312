"""Worker processes of this machine, with all tensors in memory that they share."""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from hanse.core import errors
from hanse.core.errors import HanseError, TransportError
from hanse.core.messages import Tensors
from hanse.core.wire import About, grouped, nested, read, wire_size, write
from hanse.engines.base import Crew, Engine
from hanse.engines.execution import Executor, keep_freed_memory
from hanse.engines.remote import Recipe, Remote, answer, data_of
from hanse.federation import Federation
from hanse.transport.blocks import Block, Blocks, attach, sweep

log = logging.getLogger(__name__)

TRIES = 3
"""How often a lane is given to a worker before the run ends."""
BEAT = 0.25
"""Seconds between a worker's signs of life."""
STARTS = 60.0
"""Seconds that a worker may take to start."""


class processes(Engine):
    """Processes of this machine, which share memory for models, data and results. Those that die or stand still are replaced."""

    workers: PositiveInt = 2
    """Worker processes."""
    threads: PositiveInt = 1
    """Threads inside one operation."""
    patience: Annotated[float, Field(ge=1)] = 30.0
    """Seconds without a sign of life, however busy, after which a worker is replaced."""

    def crew(self, executor: Executor, federation: Federation) -> Crew:
        recipe = Recipe.of(executor, federation, self.precision == "bf16")
        return Remote(executor, Processes(recipe, data_of(executor.samples, executor.tests), self.workers, self.patience))


class Worker:
    """One worker as its owner sees it: started once, it may take part in one run after the other."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.blocks = Blocks()
        sign = self.blocks.take(8)
        self.beats = sign.memory.view(torch.int64)[:1].zero_()
        self.connection, other = context.Pipe()
        self.process: BaseProcess = context.Process(target=serve, args=(other, sign.name), name="hanse-worker", daemon=True)
        self.process.start()
        other.close()
        self.alive()

    def begin(self, recipe: Recipe, data: tuple[str, int]) -> None:
        """Have it take part in a run; raises ``OSError`` if it is gone."""
        self.connection.send((recipe, data))
        self.mapped: dict[str, Tensor] = {}
        self.free: list[str] = []
        self.lane: int | None = None
        """What it is at."""
        self.order = 0
        self.alive()

    def finish(self) -> None:
        """The run is over; raises ``OSError`` if the worker is gone."""
        self.connection.send_bytes(b"null")

    def alive(self) -> None:
        """A sign of life."""
        self.count, self.since = int(self.beats), time.monotonic()

    def quiet(self) -> float:
        """Seconds since the last sign of life; it takes some to start."""
        if int(self.beats) != self.count:
            self.alive()
        return time.monotonic() - self.since - (0 if self.count else STARTS)

    def give(self, lane: int, order: int, request: dict[str, Any]) -> None:
        """Have it do a lane; raises ``OSError`` if it is gone."""
        free = [self.free.pop() for _ in range(len(self.free))]  # the list stays: finalizers add to it
        self.lane, self.order = lane, order
        self.alive()
        self.connection.send_bytes(json.dumps({**request, "lane": lane, "order": order, "free": free}).encode())

    def take(self) -> dict[str, Any]:
        """Its reply; raises ``OSError`` or ``EOFError`` if it is gone."""
        self.alive()
        reply: dict[str, Any] = json.loads(self.connection.recv_bytes())
        return reply

    def memory(self, name: str, size: int) -> Tensor:
        """What it has written; its block is lent again when nobody looks at it any more."""
        if name not in self.mapped:
            self.mapped[name] = attach(name)
        looked_at = self.mapped[name].numpy()
        weakref.finalize(looked_at, self.free.append, name)
        return torch.from_numpy(looked_at)[:size]

    def end(self) -> None:
        """It is gone, at once, and so is what it had in shared memory."""
        self.connection.close()
        self.process.kill()
        self.process.join()
        self.blocks.close()
        sweep()


class Pool:
    """Workers that no run needs at the moment; starting one takes as long as importing torch."""

    def __init__(self) -> None:
        self.idle: list[Worker] = []
        atexit.register(self.close)

    def take(self, recipe: Recipe, data: tuple[str, int]) -> Worker:
        """A worker that takes part in a run."""
        while self.idle:
            worker = self.idle.pop()
            try:
                worker.begin(recipe, data)
            except OSError:
                worker.end()
            else:
                return worker
        worker = Worker()
        worker.begin(recipe, data)
        return worker

    def give_back(self, worker: Worker) -> None:
        """The worker's run is over."""
        try:
            if worker.lane is not None:
                raise OSError("it is at work nobody waits for any more")
            worker.finish()
        except OSError:
            worker.end()
        else:
            self.idle.append(worker)

    def close(self) -> None:
        """End them all."""
        while self.idle:
            self.idle.pop().end()


POOL = Pool()


class Processes:
    """``Hands`` of some processes."""

    def __init__(self, recipe: Recipe, data: Tensors, workers: int, patience: float) -> None:
        self.recipe, self.patience = recipe, patience
        self.blocks = Blocks()
        block, size = self._write(data, {})
        self.data = block.name, size
        self.orders, self.replaced = 0, 0
        self.workers = [POOL.take(recipe, self.data) for _ in range(workers)]

    def _write(self, tensors: Tensors, about: About) -> tuple[Block, int]:
        size = wire_size(tensors, about=about)
        block = self.blocks.take(size)
        write(block.memory, tensors, about)
        return block, size

    def work(self, tensors: Tensors, about: About, kept: Mapping[int, Tensors]) -> list[Tensors]:
        """See ``Hands``."""
        rows = nested({str(lane): own for lane, own in kept.items()})
        block, size = self._write(nested({"all": tensors, "kept": rows}), about)
        self.orders += 1
        try:
            return self._done({"block": block.name, "size": size}, [*kept])
        finally:
            self.blocks.give_back(block)

    def _done(self, request: dict[str, Any], lanes: list[int]) -> list[Tensors]:
        waiting, tries, found = deque(lanes), dict.fromkeys(lanes, 0), dict[int, Tensors]()
        while len(found) < len(lanes):
            for place, worker in enumerate(self.workers):
                if worker.lane is None and waiting:
                    self._give(place, waiting, tries, request)
            busy = {place: worker.connection for place, worker in enumerate(self.workers) if worker.lane is not None}
            ready = wait([*busy.values()], timeout=BEAT)
            for place, connection in busy.items():
                if connection in ready:
                    self._take(place, waiting, found)
                elif self.workers[place].quiet() > self.patience:
                    self._replace(place, waiting, f"has not been heard of for {self.patience:g} s")
        return [found[lane] for lane in lanes]

    def _give(self, place: int, waiting: deque[int], tries: dict[int, int], request: dict[str, Any]) -> None:
        lane = waiting.popleft()
        tries[lane] += 1
        if tries[lane] > TRIES:
            raise TransportError(f"engine: {TRIES} workers were lost with the same clients; what they said last is on stderr")
        try:
            self.workers[place].give(lane, self.orders, request)
        except OSError:
            self._replace(place, waiting, "is gone")

    def _take(self, place: int, waiting: deque[int], found: dict[int, Tensors]) -> None:
        worker = self.workers[place]
        try:
            reply = worker.take()
        except (OSError, EOFError):
            worker.process.join(1)
            return self._replace(place, waiting, f"has ended with status {worker.process.exitcode}")
        lane, worker.lane = worker.lane, None
        tensors = read(worker.memory(reply["block"], reply["size"]))[0] if "block" in reply else {}
        if reply["order"] != self.orders or lane is None:
            return None  # of a request that has failed since
        if "error" in reply:
            raise _error(reply)
        found[lane] = tensors
        return None

    def _replace(self, place: int, waiting: deque[int], why: str) -> None:
        log.warning("worker %d %s; another one takes its place", place, why, extra={"worker": place})
        worker = self.workers[place]
        worker.end()
        self.replaced += 1
        if worker.lane is not None and worker.order == self.orders:
            waiting.append(worker.lane)
        self.workers[place] = POOL.take(self.recipe, self.data)

    def close(self) -> None:
        """See ``Hands``."""
        for worker in self.workers:
            POOL.give_back(worker)
        self.workers = []
        self.blocks.close()


def _error(reply: dict[str, Any]) -> Exception:
    """What went wrong in a worker, as the same kind of error where it is one of hanse's."""
    kind = getattr(errors, reply["error"], None)
    if isinstance(kind, type) and issubclass(kind, HanseError) and kind is not errors.MissingExtraError:
        return kind(reply["text"])
    return RuntimeError(f"in a worker:\n{reply['traceback']}")


def serve(connection: Connection, sign: str) -> None:
    """A worker's whole life: take part in runs until ``connection`` closes, with signs of life in the block ``sign``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner to deal with
    keep_freed_memory()
    with suppress(EOFError, OSError, TransportError):  # the owner is gone
        threading.Thread(target=_beat, args=(attach(sign).view(torch.int64)[:1],), daemon=True).start()
        while True:
            recipe, data = connection.recv()
            _take_part(connection, recipe, data)
    os._exit(0)


def _take_part(connection: Connection, recipe: Recipe, data: tuple[str, int]) -> None:
    """Do what is asked in one run. What goes wrong is told to who asks, also if it went wrong before."""
    torch.set_num_threads(1)
    blocks, lent = Blocks(), dict[str, Block]()
    seen, memory = "", torch.empty(0, dtype=torch.uint8)
    executor: Executor | None = None
    try:
        while (request := json.loads(connection.recv_bytes())) is not None:
            for free in request["free"]:
                blocks.give_back(lent.pop(free))
            said: dict[str, Any] = {"order": request["order"]}
            try:
                if executor is None:
                    executor = recipe.executor(read(attach(data[0])[: data[1]])[0])
                if request["block"] != seen:
                    seen, memory = request["block"], attach(request["block"])
                reply = _answer(executor, memory[: request["size"]], request["lane"])
                size = wire_size(reply)
                block = blocks.take(size)
                write(block.memory, reply)
            except Exception as error:
                said |= {"error": type(error).__name__, "text": str(error), "traceback": traceback.format_exc()}
            else:
                lent[block.name] = block
                said |= {"block": block.name, "size": size}
            reply = {}
            connection.send_bytes(json.dumps(said).encode())
    finally:
        blocks.close()


def _answer(executor: Executor, memory: Tensor, lane: int) -> Tensors:
    tensors, about = read(memory)
    groups = grouped(tensors)
    kept = grouped(groups.get("kept", {}))
    return answer(executor, groups["all"], about, lane, kept.get(str(lane), {}))


def _beat(own: Tensor) -> None:
    while True:
        own += 1
        time.sleep(BEAT)
