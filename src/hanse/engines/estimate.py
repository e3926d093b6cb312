"""What a run will cost, before anything is trained: two probe clients do one round's work, and the rest is arithmetic."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from hanse.core.messages import wire_size
from hanse.engines.arrangement import Arrangement, candidates
from hanse.engines.local import LocalNetwork
from hanse.schedules.network import Schedule

PROBED_ROUNDS = 20
"""Rounds whose cohorts are looked up for virtual time."""


@dataclass(frozen=True)
class Estimate:
    """Expected costs of a whole run: wall seconds, virtual seconds, bytes down and up, bytes of memory beyond the data."""

    wall: float
    virtual: float
    down: int
    up: int
    memory: int


def estimate(net: LocalNetwork, schedule: Schedule) -> Estimate:
    """Costs of the run that ``net`` is about to make; its state is left alone."""
    cohort = min(net.clients, schedule.expected_cohort())
    message = net.method.message(net.method.init(net.problem))
    probes = net.streams.sample("probe", net.clients, min(2, net.clients), 0)
    how = probe_arrangement(net, net.streams.sample("cohort", net.clients, cohort, 0))
    one, two = _seconds(net, probes[:1], message, how), _seconds(net, probes, message, how)
    lanes = min(how.workers, max(1, cohort // how.chunk))
    each = one if len(probes) < 2 or how.chunk == 1 else max(two - one, 0.05 * two)  # batched clients share the overhead of one
    work = one + each * (cohort - 1) / lanes
    sent = net.execute(probes, "train", message, how).bytes_up.double().mean()
    down, rounds = wire_size(message), net.total_rounds
    row, itemsize = net.problem.layout.size, net.problem.start.element_size()
    side_by_side = min(cohort, how.chunk) * lanes
    kept = sum(net.kept.widths.values()) * min(net.clients, rounds * cohort)
    return Estimate(
        wall=rounds * work,
        virtual=rounds * _virtual(net, cohort, down, float(sent)),
        down=rounds * cohort * down,
        up=int(rounds * cohort * sent),
        memory=itemsize * (row * (3 * side_by_side + 4) + kept),
    )


def probe_arrangement(net: LocalNetwork, cohort: torch.Tensor) -> Arrangement:
    """A likely arrangement, before anything has been timed: batched where the model can be stacked, else one client a core."""
    options = candidates(net, cohort)
    stacked = [o for o in options if o.path == "stacked"]
    return stacked[0] if stacked else max(options, key=lambda o: (o.path == "loop", o.workers))


def _seconds(net: LocalNetwork, clients: torch.Tensor, message: dict[str, torch.Tensor], how: Arrangement) -> float:
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        net.execute(clients, "train", message, how)
        best = min(best, time.perf_counter() - began)
        if best > 1.0:
            break
    return best


def _virtual(net: LocalNetwork, cohort: int, down: int, up: float) -> float:
    """Mean seconds of a round: the slowest of each of the first cohorts."""
    slowest = []
    for t in range(min(PROBED_ROUNDS, net.total_rounds)):
        ids = net.streams.sample("cohort", net.clients, cohort, t)
        profile = net.federation.fleet.profile(net.federation.streams, ids)
        if profile is None:
            return 0.0
        flops = net.work * net.plan.seen(net.samples.counts(ids))
        slowest.append(float(profile.seconds(flops, down, torch.full((len(ids),), up)).max()))
    return sum(slowest) / len(slowest)
