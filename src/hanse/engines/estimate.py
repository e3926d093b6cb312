"""What a run will cost, before anything is trained: two probe clients do a job, and the conversation is rehearsed without work."""

from __future__ import annotations

import math
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hanse.core.errors import HanseError
from hanse.core.messages import Reply, Tensors, Upload
from hanse.engines.arrangement import candidates
from hanse.engines.base import Arrangement
from hanse.engines.execution import Batch, Lane, Orders
from hanse.engines.simulation import Simulation
from hanse.methods.base import State
from hanse.schedules.network import Schedule

REHEARSED_ROUNDS = 20


@dataclass(frozen=True)
class Estimate:
    """Expected costs of a whole run: wall seconds, virtual seconds, bytes down and up, bytes of memory beyond the data."""

    wall: float
    virtual: float
    down: int
    up: int
    memory: int


def estimate(net: Simulation, schedule: Schedule) -> Estimate:
    """Costs of the run that ``net`` is about to make; its state is left alone."""
    probes = net.streams.sample("probe", net.clients, min(2, net.clients), 0)
    stage = Rehearsal(net, *_bytes(net, probes))
    drive(schedule.run(stage, stage.method))
    rounds = max(1, stage.round)
    each = max(1, round(stage.updates / rounds))  # client updates in a round
    total = net.total_rounds
    if stage.now > 0 and math.isfinite(net.seconds):
        total = min(total, math.ceil(net.seconds / (stage.now / rounds)))
    how = probe_arrangement(net, probes[:1].expand(each) if each > len(probes) else probes)
    one, two = _seconds(net, probes[:1], how), _seconds(net, probes, how)
    lanes = min(how.workers, max(1, each // how.chunk))
    more = one if len(probes) < 2 or how.chunk == 1 else max(two - one, 0.05 * two)  # batched clients share the overhead of one
    row, itemsize = net.problem.layout.size, net.problem.start.element_size()
    side_by_side = min(each, how.chunk) * lanes
    width = sum(net.kept.widths.values()) + len(net.codec.keeps) * net.problem.shared
    held = each * (net.method.robust + 2 * (net.adversaries is not None and net.adversaries.attack.forges))  # rows a round
    kept = width * min(net.clients, total * each)
    scale = total / rounds
    return Estimate(
        wall=total * (one + more * (each - 1) / lanes),
        virtual=stage.now * scale,
        down=int(stage.clock.down * scale),
        up=int(stage.clock.up * scale),
        memory=itemsize * (row * (3 * side_by_side + 1 + held) + kept + 3 * stage.state["x"].numel()),
    )


class Still:
    """A rule that sends what ``of`` sends and never moves."""

    def __init__(self, net: Simulation) -> None:
        self.of, self.opens, self.robust, self.start = net.method, net.method.opens, False, net.method.init(net.problem)

    def init(self, problem: object) -> State:
        return self.start

    def message(self, state: State) -> Tensors:
        return self.of.message(state)

    def asked(self, state: State, clients: Tensor) -> Tensor:
        return self.of.asked(state, clients)

    def parts(self, state: State, clients: Tensor) -> Tensor | None:
        return self.of.parts(state, clients)

    def opened(self, state: State, reply: Reply) -> State:
        return state

    def step(self, state: State, reply: Reply, round: int) -> State:
        return state


class Rehearsal(Simulation):
    """The network of ``net`` in which nobody works: every reply has ``size`` bytes and nothing in it, and ``whole`` bytes more for
    a client that may send all entries, where the server allots shares.
    """

    def __init__(self, net: Simulation, size: int, whole: int = 0) -> None:
        super().__init__(
            net.federation,
            net.method,
            net.engine,
            net.codec,
            net.down,
            seed=net.streams.seed,
            rounds=min(REHEARSED_ROUNDS, net.total_rounds),
            seconds=net.seconds,
        )
        self.kept.widths = {}
        self.method: Any = Still(net)
        self.size, self.whole, self.total_weight, self.privacy = size, whole, 1.0, net.privacy

    def perform(self, orders: Orders, total: bool) -> list[Lane]:
        size = self.size if self.privacy is None else self.privacy.up() or self.size
        ones, sizes = torch.ones(len(orders)), torch.full((len(orders),), size)
        if orders.share is not None:
            sizes += (orders.share * self.whole).long()
        upload = Upload(orders.clients, ones, {}, {}, {}, ones)
        return [Lane(batches=[Batch(orders.tickets, orders.versions, upload, sizes, {}, ones.bool())])]

    def _enough(self, came: Tensor) -> None:
        """How many are too few is for the run itself to say, which saves what it has first."""

    def _private(self, reply: Reply) -> Reply:
        return reply


def drive(conversation: Coroutine[Any, Any, None]) -> None:
    """Run a schedule's coroutine to its end; with this engine every answer is ready when it is awaited."""
    try:
        conversation.send(None)
    except StopIteration:
        return
    raise HanseError("the schedule waits for something that this engine never sends")


def probe_arrangement(net: Simulation, cohort: Tensor) -> Arrangement:
    """A likely arrangement, before anything has been timed: batched where the model can be stacked, else one client a core."""
    options = candidates(net, cohort)
    stacked = [o for o in options if o.path == "stacked"]
    return stacked[0] if stacked else max(options, key=lambda o: (o.path == "loop", o.workers))


def _orders(net: Simulation, clients: Tensor) -> Orders:
    zeros, steps = torch.zeros_like(clients), net.plan.lengths(net.samples.counts(clients))
    message = net.method.message(net.method.init(net.problem))
    return Orders("train", [message], zeros, clients, zeros, zeros, steps, zeros)


def _bytes(net: Simulation, clients: Tensor) -> tuple[int, int]:
    """Mean bytes of a reply, and how many more they are with a whole share than without any, where shares are allotted."""

    def mean(share: float | None) -> int:
        own = None if share is None else torch.full((len(clients),), share, dtype=torch.float64)
        lanes = net.executor.run(replace(_orders(net, clients), share=own), probe_arrangement(net, clients), total=True)
        return int(torch.cat([b.bytes_up for lane in lanes for b in lane.batches]).double().mean())

    if net.shares(clients) is None:
        return mean(None), 0
    half, all_of_it = mean(0.5), mean(1.0)
    return 2 * half - all_of_it, 2 * (all_of_it - half)


def _seconds(net: Simulation, clients: Tensor, how: Arrangement) -> float:
    best, orders = math.inf, _orders(net, clients)
    for _ in range(3):
        began = time.perf_counter()
        net.executor.run(orders, how, total=True)
        best = min(best, time.perf_counter() - began)
        if best > 1.0:
            break
    return best
