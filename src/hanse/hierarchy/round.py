"""One mean: updates are put or handed in until it is finished, and go up the tree."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from hanse.core.errors import ConfigError, HanseError
from hanse.hierarchy.store import Stored
from hanse.hierarchy.task import Task, tasks

if TYPE_CHECKING:
    from hanse.hierarchy.service import Aggregation


class Round:
    """Made by ``Aggregation.round``."""

    def __init__(self, service: Aggregation, assigned: list[int], order: str, deadline: float | None) -> None:
        self.service, self.order = service, order
        self.began = time.monotonic()
        self.ends = math.inf if deadline is None else self.began + deadline
        self.nodes = assigned
        """The node of every place."""
        self.closed = self.over = False
        self.result: Stored | None = None
        self.tasks, self._places = tasks(service.nodes, assigned, service.fan_in, service.workers)
        self._open = dict.fromkeys(range(len(assigned)))

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
        if place is None:
            place = next((p for p in self._open if self.nodes[p] == node), None)
        late = self.late or place is None
        if not keep and (late or not weight):
            room.release()
        if late or place is None:
            self.service.counters.late += 1
            return False
        del self._open[place]
        self.service.nodes[node].arrived += 1
        if weight:
            room.weight = weight
            room.references += keep
        self.arrive(*self._places[place], room if weight else None)
        self.service.pump(0)
        return True

    def finish(self, out: Tensor | None = None) -> tuple[Tensor, float]:
        """The weighted mean of what has arrived, ``[size]`` in the type of accumulation, and the sum of the weights.

        The mean is the shared memory that it was written to, or ``out`` if given. Raises ``HanseError`` if nothing with a weight
        has arrived, ``ConfigError`` on an ``out`` of another shape, and ``TransportError`` if aggregators end again and again or
        no memory is left. Whatever happens, the next round may begin.
        """
        if self.closed:
            raise ConfigError("round: it has been finished")
        if out is not None and out.shape != (self.service.size,):
            raise ConfigError(f"out: {tuple(out.shape)}; allowed: ({self.service.size},)")
        self.closed = True
        seconds = max(time.monotonic() - self.began, 1e-9)
        try:
            for place in self._open:
                self.arrive(*self._places[place], None)
            while not self.over:
                self.service.pump(None)
        except BaseException:
            self.service.give_up()
            raise
        self.service.end_round(seconds)
        if self.result is None:
            raise HanseError("round: nothing with a weight has arrived")
        result, weight = self.result, self.result.weight
        if out is None:
            return self.service.give_away(result), weight
        out.copy_(result.values)
        result.release()
        return out, weight

    def arrive(self, task: Task | None, slot: int, stored: Stored | None) -> None:
        """Give a task an input (None: it will not come), and hand it on past those that have nothing to add to it."""
        while task is not None:
            task.inputs[slot] = stored
            if not task.has_nothing_to_add():
                self.service.move(task)
                return
            if task in task.node.waiting:
                task.node.waiting.remove(task)
            stored = next(iter(task.present), None)
            task.inputs = {}
            slot, task = task.slot, task.parent
        self.result, self.over = stored, True

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
