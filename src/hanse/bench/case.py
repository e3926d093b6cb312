"""One timed case in its own process: ``python -m hanse.bench.case '{"who": "hanse", "workload": "W1"}'`` prints a JSON line."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from typing import Any

import torch

from hanse.bench.workloads import WORKLOADS, Name, federation, raw_rounds
from hanse.codecs import Codec
from hanse.engines import local
from hanse.engines.execution import Lane
from hanse.engines.simulation import Simulation
from hanse.experiment import run
from hanse.fleet.clock import Jobs
from hanse.methods import FedAvg, Method
from hanse.schedules import fedbuff, synchronous
from hanse.track.run import Record


class Clock:
    """Notes when each round was committed, and how many client updates there had been."""

    def __init__(self) -> None:
        self.times, self.updates = [time.perf_counter()], [0]

    def write(self, record: Record) -> None:
        """One round is over."""
        self.times.append(time.perf_counter())
        self.updates.append(record["updates"])

    def close(self) -> None:
        """Nothing to do."""

    def rounds(self, cohort: int) -> list[float]:
        """Seconds of ``cohort`` client updates, the first so many apart; the last round is left out because it evaluates."""
        whole = [i for i, n in enumerate(self.updates[:-1]) if n // cohort > self.updates[i - 1] // cohort and i]
        marks = [0, *whole]
        updates = [self.updates[i] for i in marks]
        pairs = zip(marks, marks[1:], updates, updates[1:], strict=False)
        return [(self.times[b] - self.times[a]) * cohort / (m - n) for a, b, n, m in pairs]


def one_at_a_time(net: Simulation) -> None:
    """Have every job executed by itself instead of together with all that are out."""
    together = net._execute

    def alone(jobs: Jobs, total: bool) -> list[Lane]:
        return [lane for i in range(len(jobs)) for lane in together(jobs[i : i + 1], total)]

    net._execute = alone  # type: ignore[method-assign]


def measure(
    who: str,
    workload: Name,
    epochs: int = 1,
    method: str = "FedAvg",
    codec: str = "identity",
    engine: str = "local",
    buffer: int = 0,
    rounds: int = 0,
) -> dict[str, Any]:
    """Seconds per round after the first (median), the first round, peak memory in MB, and the loss and accuracy reached.

    With ``buffer``, FedBuff of so many replies on devices of unequal speed, as many clients at work as a round has: the seconds
    are then those of as many client updates as a round has. ``who`` "alone" executes every client's work by itself.
    """
    fed, work = federation(workload, "devices(job=lognormal(1, 0.5))" if buffer else "ideal"), WORKLOADS[workload]
    rounds = rounds or max(3, work.rounds // (1 if epochs == 1 else 2))
    problem, split = fed.problem, fed.split
    arrangement = ""
    if who == "raw":
        torch.set_num_threads(1)
        spent, model = raw_rounds(fed, work, epochs, rounds)
        w = problem.layout.flatten({n: p.detach() for n, p in model.named_parameters()})
    else:
        clock, schedule = Clock(), fedbuff(buffer, work.cohort) if buffer else synchronous(cohort=work.cohort)
        rule = Method.named(method)
        assert issubclass(rule, FedAvg)
        found = run(
            fed,
            rule(lr=work.lr, batch=work.batch, epochs=epochs, shuffle=False),
            schedule,
            rounds=rounds * work.cohort // buffer if buffer else rounds,
            codec=Codec.parse(codec),
            engine=local.parse(engine),
            evaluate=0,
            writers=[clock],
            on_start=one_at_a_time if who == "alone" else lambda net: None,
        )
        spent = clock.rounds(work.cohort)
        w, arrangement = found.state["state.x"], found.notes["arrangement"]
    scores = problem.evaluate(w, problem.start_buffers, split.test_x, split.test_y)
    return {
        "seconds": statistics.median(spent[1:]),
        "first": spent[0],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "arrangement": arrangement,
        **scores,
    }


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
