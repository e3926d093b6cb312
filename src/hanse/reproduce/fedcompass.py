"""FedCompass (Li et al., ICLR 2024, arXiv 2309.14675): its schedule alone, and the digits on clients of unequal speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hanse.core.context import Context
from hanse.core.messages import Upload
from hanse.core.streams import Streams
from hanse.data.partition import Partition, gather, natural, shuffled
from hanse.data.task import Dataset
from hanse.data.tasks import digits, quadratics
from hanse.engines.local import LocalNetwork, local
from hanse.experiment import run
from hanse.federation import Federation
from hanse.fleet.distributions import listed
from hanse.fleet.profiles import devices
from hanse.methods.fedasync import FedAsync
from hanse.methods.fedavg import FedAvg
from hanse.reproduce.base import SEEDS, Findings, Property, Scored, follow, test_accuracy
from hanse.schedules.fedbuff import fedasync
from hanse.schedules.fedcompass import fedcompass
from hanse.schedules.network import Schedule
from hanse.schedules.synchronous import synchronous
from hanse.track.figures import COLOURS
from hanse.track.run import Record

STEP = (0.01, 0.02, 0.03, 0.04, 0.05)
SECONDS, GOAL = 80, 0.9
RATES, ALPHAS = (0.05, 0.1, 0.2), (0.6, 0.9)
OURS, SYNC, ASYNC = "FedCompass", "FedAvg", "FedAsync"
COMPASS = fedcompass()


class four_classes(Partition):
    """Each of five clients has half the samples of four classes: of two of its own, in a random order, and of the next client's."""

    abstract: ClassVar[bool] = True

    def deal(self, data: Dataset, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
        own = shuffled(len(data.names), streams, "partition.classes")[data.group] // 2
        half = shuffled(len(data.x), streams, "partition.halves") % 2
        return gather((own - half) % clients, clients, streams)


class Idle(FedAvg):
    """No training at all, for the schedule alone."""

    abstract: ClassVar[bool] = True

    def train(self, ctx: Context) -> Upload:
        return ctx.upload(self.weigh(ctx), delta=torch.zeros(len(ctx.ids), ctx.start.shape[-1], dtype=ctx.loss.dtype))


class Timetable:
    """What a schedule does with clients of which a local step takes so many seconds: a run without training."""

    def __init__(self, step: Sequence[float], schedule: fedcompass, rounds: int) -> None:
        self.records: list[Record] = []
        self.groups: list[int] = []
        m, fleet = len(step), devices(step=listed(tuple(step)))
        where = Federation(quadratics(count=m, dimension=1), m, natural(), fleet)
        run(
            where,
            Idle(),
            schedule,
            rounds=rounds,
            evaluate=0,
            engine=local("vmap", m, 1, 1),
            writers=[self],
            on_start=self.start,
        )
        sizes = torch.tensor([len(r["cohort"]) for r in self.records], dtype=torch.float64)
        stale = torch.tensor([r["staleness"] for r in self.records], dtype=torch.float64)
        self.sizes, self.staleness = sizes, stale
        self.mean_staleness = float(sizes @ stale / sizes.sum())
        self.jobs = torch.tensor(
            [[j[0], j[2], round((j[4] - j[3]) / step[j[0]])] for r in self.records for j in r["jobs"] if j[3] is not None and j[4]],
            dtype=torch.float64,
        )

    def start(self, net: LocalNetwork) -> None:
        self.net = net

    def write(self, record: Record) -> None:
        self.records.append(record)
        self.groups.append(len(self.net.notes["number"]))

    def close(self) -> None:
        pass

    @property
    def balance(self) -> tuple[int, int, int]:
        """Jobs sent; those aggregated; those under way or waiting in a group."""
        return self.net.clock.tickets, self.net.updates, len(self.net.out) + len(self.net.arrived)


def first(run: Scored) -> float:
    """When the accuracy was ``GOAL`` for the first time; inf if never."""
    reached = run.seconds[run.score >= GOAL]
    return float(reached[0]) if len(reached) else math.inf


def final(run: Scored) -> float:
    """Mean accuracy over the last quarter of the time; 0 if the run diverged."""
    diverged = not len(run.seconds) or float(run.seconds[-1]) < 0.9 * SECONDS
    return 0.0 if diverged else float(run.at(torch.linspace(0.75 * SECONDS, SECONDS, 200, dtype=torch.float64)).mean())


def mean(values: Sequence[float]) -> float:
    """Over the seeds."""
    return sum(values) / len(values)


def arms() -> dict[str, list[tuple[FedAvg, Schedule]]]:
    """What is compared, each with the settings it is tuned over."""
    work = {"batch": 32, "steps": COMPASS.q_max, "weights": "uniform"}
    return {
        SYNC: [(FedAvg(lr=lr, **work), synchronous(cohort=len(STEP))) for lr in RATES],
        ASYNC: [(FedAsync(lr=lr, **work), fedasync(alpha=alpha)) for lr in RATES for alpha in ALPHAS],
        OURS: [(FedAvg(lr=lr, **work), COMPASS) for lr in RATES],
    }
