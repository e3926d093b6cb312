"""Where updates go, by whom they are added, and how many aggregators that takes: pure functions.

Qi, Ramakrishnan, Lee: "LIFL", MLSys 2024, arXiv 2405.10968, for nodes i:

    Q_i <- a k_i E_i + (1 - a) Q_i        k_i updates a second, E_i seconds an aggregation, a = 0.7; at first Q_i = k_i E_i
    RC_i = MC_i - Q_i                     residual capacity
    each update to the node of the smallest RC_i that is at least 1; then RC_i <- RC_i - 1        BestFit
    leaves = ceil(updates / I)            one middle aggregator if there are several leaves, one top if there are several nodes
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple


class Role(IntEnum):
    """What an aggregator does at the moment. It may be promoted from one task to the next."""

    LEAF = 0
    MIDDLE = 1
    TOP = 2
    SENDER = 3


def smoothed(before: float | None, rate: float, seconds: float, a: float = 0.7) -> float:
    """The queue estimate after a period with ``rate`` updates a second and ``seconds`` an aggregation."""
    now = rate * seconds
    return now if before is None else a * now + (1 - a) * before


def best_fit(capacity: Sequence[float], queued: Sequence[float], updates: int) -> tuple[list[int], int]:
    """The node of each update, and how many of them, the last ones, are beyond all capacity and queue where most is left."""
    residual = [most - now for most, now in zip(capacity, queued, strict=True)]
    nodes: list[int] = []
    for i in sorted(range(len(residual)), key=residual.__getitem__):  # the fullest stays the fullest until it has no room
        nodes += [i] * min(max(int(residual[i]), 0), updates - len(nodes))
        residual[i] -= nodes.count(i)
    waiting = updates - len(nodes)
    return nodes + [max(range(len(residual)), key=residual.__getitem__)] * waiting, waiting


def round_robin(nodes: int, updates: int) -> list[int]:
    """The node of each update where they are dealt out in turn."""
    return [i % nodes for i in range(updates)]


def top(nodes: Sequence[int]) -> int:
    """The node that has most of the updates, the first of those; results of all others have to travel to it."""
    return max(sorted(set(nodes)), key=nodes.count)


def transfers(nodes: Sequence[int]) -> int:
    """Results that travel between nodes: one from each used node but the top's."""
    return max(0, len(set(nodes)) - 1)


def leaves(updates: float, fan_in: int) -> int:
    """Leaves for so many updates: ``ceil(updates / fan_in)``."""
    return int(-(-updates // fan_in))


class Step(NamedTuple):
    """One task of an aggregator: ``inputs`` of it in order, and where its result goes: an input ``slot`` of step ``parent``."""

    role: Role
    inputs: int
    parent: int
    slot: int


OUT = -1
"""The parent of the step whose result is the node's."""


def tree(updates: int, fan_in: int, lanes: int) -> tuple[list[Step], list[tuple[int, int]]]:
    """The steps on a node, and the (step, slot) of each update.

    Updates are taken in groups of ``fan_in``, a leaf's task each. No more than ``lanes`` leaves exist at once: group g is taken by
    leaf ``g % lanes``, which adds it to its own last result. So memory does not grow with the number of updates. The middle one
    adds the leaves' last results. All of this follows from the three numbers alone.
    """
    groups = leaves(updates, fan_in)
    lanes = min(groups, lanes)
    steps, places = [], []
    for g in range(groups):
        size, again, last = min(fan_in, updates - g * fan_in), g >= lanes, g + lanes >= groups
        parent, slot = (g + lanes, 0) if not last else (groups, g % lanes) if lanes > 1 else (OUT, 0)
        steps.append(Step(Role.LEAF, size + again, parent, slot))
        places += [(g, again + i) for i in range(size)]
    if lanes > 1:
        steps.append(Step(Role.MIDDLE, lanes, OUT, 0))
    return steps, places


def choose(idle: Sequence[Role], role: Role) -> int | None:
    """Which of the idle aggregators takes a task: one of the same role, else the nearest below, which is promoted, else any."""
    if not idle:
        return None
    return min(range(len(idle)), key=lambda i: (idle[i] > role, abs(role - idle[i]), i))
