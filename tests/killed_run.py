"""A run in a process of its own, slow enough to be killed: ``python killed_run.py FOLDER SECONDS_BETWEEN_CHECKPOINTS``."""

import sys
import time
from pathlib import Path

import torch

import hanse as hs
from hanse import experiment
from hanse.core.optim import exponential, sgd
from hanse.track.run import Record

ROUNDS = 60


class Slow:
    """Makes every round take a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def write(self, record: Record) -> None:
        time.sleep(self.seconds)

    def close(self) -> None:
        pass


def run(out: Path, pause: float) -> hs.Run:
    """Client state, server state, a codec, a fleet and ragged clients, all of which a checkpoint must bring back."""
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=12, partition=hs.dirichlet(0.3), fleet=hs.fleet.phones())
    return hs.run(
        federation,
        hs.methods.Scaffold(lr=exponential(0.2, 0.99), server=sgd(momentum=0.5)),
        hs.schedules.synchronous(cohort=4),
        rounds=ROUNDS,
        codec=hs.codecs.topk(0.5),
        engine=hs.engines.local("stacked", 3, 1, 1),
        evaluate=3,
        out=out,
        writers=[Slow(pause)],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    experiment.CHECKPOINT_SECONDS = float(sys.argv[2])
    run(Path(sys.argv[1]), 0.02)
