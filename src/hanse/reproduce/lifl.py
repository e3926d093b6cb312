"""Hierarchical aggregation (Qi, Ramakrishnan, Lee: LIFL, MLSys 2024, arXiv 2405.10968): simulated nodes, real processes."""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from hanse.bench.aggregation import COPIED, ONE, ours, theirs
from hanse.core.streams import Streams
from hanse.hierarchy.plan import best_fit, round_robin, smoothed, transfers
from hanse.hierarchy.service import Aggregation
from hanse.reproduce.base import Findings, Property, panels
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODES, CAPACITY, ROUNDS, PERIOD, EACH, IDLE = 4, 20, 200, 20.0, 0.5, 5.0
MODEL = 100e6
CLIENTS, SIZE, GAP, REPEATS = 16, 2_000_000, 0.01, 15
UPDATES = 300
SETTING = (
    f"Simulated: {NODES} nodes that take MC = {CAPACITY} updates each, {ROUNDS} rounds {PERIOD:.0f} s apart, whose updates come and"
    " go like a wave with noise, between 4 and 44; an update takes"
    f" E = {EACH} s, a model has 100 MB, and a node is up while it adds and T_idle = {IDLE:.0f} s more. BestFit by RC = MC - Q"
    f" against dealing out in turn, and against {NODES} nodes that are always up. Measured on one machine: {CLIENTS} updates of"
    f" {4 * SIZE // 1_000_000} MB that come {1000 * GAP:.0f} ms apart to two aggregators, eager and lazy in turn, medians of"
    f" {REPEATS} rounds; CPU seconds of clients, server and aggregators for {UPDATES} such updates, which a client copies into"
    " shared memory, or sends as safetensors messages over TCP to one process."
)


class Course(NamedTuple):
    """A simulated run by rounds: updates, bytes between nodes so far, and node-seconds so far, under either placement."""

    updates: list[int]
    sent: dict[str, list[float]]
    seconds: dict[str, list[float]]


BEST, TURN, ALWAYS = "BestFit", "in turn", "always on"


def load(round: int) -> int:
    """Updates in a round."""
    noise = Streams(0).numpy("workload", 0, round).uniform(-6, 6)
    return max(4, min(44, int(24 + 16 * math.sin(2 * math.pi * round / 50) + noise)))


def simulate(rounds: int = ROUNDS) -> Course:
    """Every round under both placements."""
    updates, sent, seconds = list[int](), {BEST: [0.0], TURN: [0.0]}, {BEST: [0.0], TURN: [0.0], ALWAYS: [0.0]}
    queues: list[float | None] = [None] * NODES
    for t in range(rounds):
        n = load(t)
        updates.append(n)
        placed, waiting = best_fit([CAPACITY] * NODES, [q or 0.0 for q in queues], n)
        assert not waiting
        queues = [smoothed(q, placed.count(i) / PERIOD, EACH) for i, q in enumerate(queues)]
        for name, nodes in ((BEST, placed), (TURN, round_robin(NODES, n))):
            sent[name].append(sent[name][-1] + transfers(nodes) * MODEL)
            up = sum(min(PERIOD, nodes.count(i) * EACH + IDLE) for i in set(nodes))
            seconds[name].append(seconds[name][-1] + up)
        seconds[ALWAYS].append(seconds[ALWAYS][-1] + NODES * PERIOD)
    return Course(updates, sent, seconds)


def staggered(service: Aggregation, update: torch.Tensor) -> tuple[float, float]:
    """Seconds of a round of updates that come one after the other, and how many of them are after the last."""
    out, round, began = torch.empty(SIZE), service.round(CLIENTS), time.perf_counter()
    for i in range(CLIENTS):
        time.sleep(max(0.0, began + i * GAP - time.perf_counter()))
        round.put(update)
    last = time.perf_counter()
    round.finish(out)
    now = time.perf_counter()
    return now - began, now - last


def waits() -> dict[str, tuple[float, float]]:
    """Median seconds of a round and of what is left after the last update, eager and lazy, in turn."""
    found: dict[str, list[tuple[float, float]]] = {"eager": [], "lazy": []}
    update = torch.ones(SIZE)
    with (
        Aggregation(SIZE, workers=2, fan_in=8, idle=60) as eager,
        Aggregation(SIZE, workers=2, fan_in=8, idle=60, eager=False) as lazy,
    ):
        for i in range(REPEATS + 2):
            for name, service in (("eager", eager), ("lazy", lazy)):
                seconds = staggered(service, update)
                if i > 1:
                    found[name].append(seconds)
    return {name: (statistics.median(a for a, _ in x), statistics.median(b for _, b in x)) for name, x in found.items()}


def draw(course: Course, cpu: dict[str, float]) -> Figure:
    """Bytes and node-seconds by rounds, and CPU time an update."""
    figure, (left, middle, right) = panels(12, 1, 1, 0.7)
    for (name, values), colour in zip(course.sent.items(), COLOURS, strict=False):
        left.plot([v / 1e9 for v in values], color=colour, label=name)
    for (name, values), colour in zip(course.seconds.items(), COLOURS, strict=False):
        middle.plot([v / 3600 for v in values], color=colour, label=name)
    right.bar(range(len(cpu)), [1000 * v for v in cpu.values()], color=COLOURS[: len(cpu)])
    right.set_xticks(range(len(cpu)), ["shared memory", "TCP"])
    left.set(xlabel="rounds", ylabel="GB between nodes")
    middle.set(xlabel="rounds", ylabel="node-hours")
    right.set(ylabel="CPU ms an update of 8 MB")
    for ax in (left, middle):
        ax.legend(frameon=False)
    return figure


def reproduce() -> Findings:
    """Measure the claims; less than a minute on two cores."""
    course = simulate()
    spent = waits()
    cpu = {}
    for who, measure in ((COPIED, ours), (ONE, theirs)):
        found = measure(who, UPDATES, SIZE)
        cpu[who] = (found["cpu_s"] + found["client_cpu_s"]) / UPDATES
    share = sum(course.updates) / (NODES * CAPACITY * ROUNDS)
    sent = {name: values[-1] / 1e9 for name, values in course.sent.items()}
    hours = {name: values[-1] / 3600 for name, values in course.seconds.items()}
    (eager, after_eager), (lazy, after_lazy) = spent["eager"], spent["lazy"]
    return Findings(
        "Hierarchical aggregation: placement, eagerness and shared memory",
        SETTING,
        [
            Property(
                "between nodes",
                "BestFit moves fewer bytes than dealing out in turn",
                f"{sent[BEST]:.1f} GB against {sent[TURN]:.1f} GB",
                sent[BEST] < sent[TURN],
            ),
            Property(
                "node-seconds",
                "below half load fewer than nodes that are always up",
                f"{hours[BEST]:.2f} node-hours against {hours[ALWAYS]:.2f}, at {100 * share:.0f} % load",
                hours[BEST] < hours[ALWAYS] and share < 0.5,
            ),
            Property(
                "eager",
                "a round whose updates are staggered is over no later than a lazy one",
                f"{1000 * eager:.1f} ms against {1000 * lazy:.1f} ms",
                eager <= lazy,
            ),
            Property(
                "CPU time",
                "an update through shared memory takes less than one over TCP",
                f"{1000 * cpu[COPIED]:.2f} ms against {1000 * cpu[ONE]:.2f} ms",
                cpu[COPIED] < cpu[ONE],
            ),
        ],
        ("what", "one", "other"),
        [
            ["GB between nodes, BestFit and in turn", f"{sent[BEST]:.1f}", f"{sent[TURN]:.1f}"],
            ["node-hours, BestFit and in turn", f"{hours[BEST]:.2f}", f"{hours[TURN]:.2f}"],
            ["ms of a round, eager and lazy", f"{1000 * eager:.1f}", f"{1000 * lazy:.1f}"],
            ["ms after the last update, eager and lazy", f"{1000 * after_eager:.1f}", f"{1000 * after_lazy:.1f}"],
            ["CPU ms an update, shared memory and TCP", f"{1000 * cpu[COPIED]:.2f}", f"{1000 * cpu[ONE]:.2f}"],
        ],
        draw(course, cpu),
    )
