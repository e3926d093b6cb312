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
from hanse.experiment import run
from hanse.methods import FedAvg, Method
from hanse.schedules import synchronous
from hanse.track.run import Record


class Clock:
    """Notes when each round was committed."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def write(self, record: Record) -> None:
        """One round is over."""
        self.times.append(time.perf_counter())

    def close(self) -> None:
        """Nothing to do."""


def measure(
    who: str,
    workload: Name,
    epochs: int = 1,
    method: str = "FedAvg",
    codec: str = "identity",
    engine: str = "local",
    rounds: int = 0,
) -> dict[str, Any]:
    """Seconds per round after the first (median), the first round, peak memory in MB, and the loss and accuracy reached."""
    fed, work = federation(workload), WORKLOADS[workload]
    rounds = rounds or max(3, work.rounds // (1 if epochs == 1 else 2))
    problem, split = fed.problem, fed.split
    arrangement = ""
    if who == "raw":
        torch.set_num_threads(1)
        spent, model = raw_rounds(fed, work, epochs, rounds)
        w = problem.layout.flatten({n: p.detach() for n, p in model.named_parameters()})
    else:
        clock = Clock()
        rule = Method.named(method)
        assert issubclass(rule, FedAvg)
        found = run(
            fed,
            rule(lr=work.lr, batch=work.batch, epochs=epochs, shuffle=False),
            synchronous(cohort=work.cohort),
            rounds=rounds,
            codec=Codec.parse(codec),
            engine=local.parse(engine),
            evaluate=0,
            writers=[clock],
        )
        spent = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
        spent[-1] = spent[-2]  # the last one evaluates
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
