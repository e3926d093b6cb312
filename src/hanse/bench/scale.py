"""A million registered clients: ``python -m hanse.bench.scale`` prints what building and running them costs as a JSON line.

``python -m hanse.bench.scale asynchronous 10000`` (or any number of clients) does so without a barrier, a thousand at work.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time

import torch
from torch import nn

from hanse.bench.case import Clock
from hanse.bench.workloads import in_order
from hanse.core.streams import Streams
from hanse.data.task import Dataset, Task
from hanse.engines import local
from hanse.experiment import run
from hanse.federation import Federation
from hanse.fleet import bernoulli, devices, lognormal
from hanse.methods import FedAvg
from hanse.schedules import fedbuff, synchronous

CLIENTS, SAMPLES, COHORT = 1_000_000, 20, 1_000


class many(Task):
    """Twenty samples of 64 numbers for each of very many clients: one array of 5 GB would hide what is measured, so rows repeat."""

    clients: int = CLIENTS
    """Number of clients."""

    def data(self, streams: Streams) -> Dataset:
        x = torch.randn(200_000, 64, generator=streams.torch("workload"))
        y = torch.randint(10, (200_000,), generator=streams.torch("labels"))
        spread = x[:1].expand(self.clients * SAMPLES, 64)
        labels = y[:1].expand(self.clients * SAMPLES)
        return Dataset(spread, labels, x[:2000], y[:2000], labels, tuple("0123456789"))

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def resident() -> float:
    """Peak memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(rounds: int = 1000) -> dict[str, float]:
    """Seconds and MB to build; seconds per round; growth of the peak between a tenth of the rounds and the last."""
    before, began = resident(), time.perf_counter()
    fed = Federation(many(), CLIENTS, in_order(test=0))
    assert fed.problem and fed.split
    built, memory = time.perf_counter() - began, resident() - before
    clock, peaks = Clock(), []

    class Watch:
        """Notes the peak after every round."""

        def write(self, record: object) -> None:
            """One round."""
            peaks.append(resident())

        def close(self) -> None:
            """Nothing to do."""

    rule = FedAvg(lr=0.1, batch=SAMPLES, shuffle=False)
    engine = local(path="stacked", chunk=500, workers=1, threads=2)
    run(fed, rule, synchronous(cohort=COHORT), rounds=rounds, evaluate=0, writers=[clock, Watch()], engine=engine)
    spent = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    growth = peaks[-2] - peaks[rounds // 10]
    return {
        "build_s": built,
        "build_mb": memory,
        "round_s": statistics.median(spent[1:]),
        "growth_mb": growth,
        "peak_mb": peaks[-1],
    }


def asynchronous(clients: int, updates: int = 10_000) -> dict[str, float]:
    """Milliseconds an update, a thousand clients at work on unequal devices that come and go, and growth of the peak in MB."""
    fleet = devices(job=lognormal(10, 0.5), up=5, trace=bernoulli(0.5, slot=60))
    fed = Federation(many(clients), clients, in_order(test=0), fleet)
    assert fed.problem and fed.split
    before, clock, buffer = resident(), Clock(), COHORT // 10
    engine = local(path="stacked", chunk=500, workers=1, threads=2)
    rule = FedAvg(lr=0.1, batch=SAMPLES, shuffle=False)
    run(fed, rule, fedbuff(buffer, COHORT), rounds=updates // buffer, evaluate=0, writers=[clock], engine=engine)
    ten = len(clock.times) // 10
    spent, done = clock.times[-2] - clock.times[ten], clock.updates[-2] - clock.updates[ten]
    return {"clients": clients, "update_ms": 1000 * spent / done, "growth_mb": resident() - before}


if __name__ == "__main__":
    print(json.dumps(asynchronous(int(sys.argv[2])) if sys.argv[1:2] == ["asynchronous"] else measure()))
