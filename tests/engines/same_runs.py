"""Small runs of every kind, which have to come to the same bits wherever they run."""

from __future__ import annotations

import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import torch

import hanse as hs
from hanse.core.context import Context
from hanse.core.messages import Upload
from hanse.engines import Engine

ARRANGED: dict[str, Any] = {"path": "stacked", "chunk": 2, "workers": 2, "threads": 1}
PHONES = hs.fleet.Fleet.parse("devices(job=evenly(1.0, 0.2), loss=0.1)")

CASES: dict[str, dict[str, Any]] = {
    "a plain mean": {},
    "one step": {"method": hs.methods.FedAvg(steps=1)},
    "books": {"method": hs.methods.Scaffold()},
    "books, without a barrier": {"method": hs.methods.Scaffold(), "schedule": hs.schedules.fedbuff(buffer=3, cohort=5)},
    "feedback": {"codec": hs.codecs.feedback(hs.codecs.topk(0.2) | hs.codecs.uniform(8)), "down": hs.codecs.cast()},
    "an opening": {"method": hs.methods.MIFA()},
    "somebody lies": {"method": hs.methods.FedAvg(aggregate=hs.aggregators.median()), "attack": hs.attacks.sign_flip(share=0.3)},
    "nobody is seen": {
        "method": hs.methods.FedAvg(weights="uniform"),
        "privacy": [hs.privacy.differential(clip=0.5, noise=1.0), hs.privacy.secure()],
    },
    "a rule's own codecs": {"method": hs.methods.FRL()},
    "work that cannot be batched": {"path": "loop", "chunk": 1},
    "one by one": {"method": hs.methods.OPWA(), "codec": hs.codecs.topk(0.3)},
    "peers in lockstep": {"schedule": hs.schedules.gossip()},
    "peers' programs": {"schedule": hs.schedules.async_gossip()},
}


class FallsOnce(hs.methods.Scaffold):
    """A rule whose process is killed in its third round, in the middle of its work, but only once."""

    flag: str
    """A file that says that it has happened."""

    def train(self, ctx: Context) -> Upload:
        upload = super().train(ctx)
        if bool((ctx.rounds == 2).any()) and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return upload


@cache
def federation() -> hs.Federation:
    return hs.Federation(hs.tasks.digits(hidden=8), clients=7, partition=hs.dirichlet(0.5), fleet=PHONES, dtype="float64")


def going(engine: Engine, *, method: Any = None, schedule: Any = None, **how: Any) -> hs.Run:
    """Four rounds in ``engine``."""
    for place in ("path", "chunk"):
        how.pop(place, None)
    schedule = schedule or hs.schedules.synchronous(cohort=5)
    return hs.run(federation(), method or hs.methods.FedAvg(), schedule, rounds=4, engine=engine, **how)


def arranged(case: str, **how: Any) -> dict[str, Any]:
    """The arrangement of a case."""
    return ARRANGED | {n: v for n, v in CASES[case].items() if n in ARRANGED} | how


@cache
def expected(case: str, shards: int = 1) -> hs.Run:
    """What a case comes to in this process."""
    return going(hs.engines.local(**arranged(case, shards=shards)), **CASES[case])


def agree(one: hs.Run, other: hs.Run) -> None:
    """Histories, models and all that a run would go on from are the same bit for bit."""
    assert one.history == other.history
    assert one.state.keys() == other.state.keys() and one.weights.keys() == other.weights.keys()
    assert [name for name, t in one.state.items() if not torch.equal(t, other.state[name])] == []
    assert [name for name, t in one.weights.items() if not torch.equal(t, other.weights[name])] == []
