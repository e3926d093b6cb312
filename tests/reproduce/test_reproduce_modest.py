"""What the experiment on MoDeST measures with; the experiment itself takes minutes."""

from __future__ import annotations

import math

import pytest
import torch

from hanse.fleet.participation import joins, leaves
from hanse.methods.fedavg import FedAvg
from hanse.reproduce import modest as experiment
from hanse.reproduce.modest import GOAL, NODES, SHARE, A, Course, S, course, federation
from hanse.schedules.modest import modest
from hanse.schedules.synchronous import synchronous

RULE = FedAvg(lr=0.3, steps=2, batch=20, weights="uniform")


def test_models_are_counted_where_they_are_sent():
    served = course(federation(0), RULE, synchronous(cohort=S), 3)
    assert served.transfers.tolist() == [2 * S, 4 * S, 6 * S]
    ours = course(federation(0), RULE, modest(sample=S, aggregators=A), 3)
    assert ours.transfers.shape == ours.accuracy.shape == (3,)
    assert (A * S - A) * 1 <= float(ours.transfers[0]) <= A * S and float(ours.transfers[-1]) <= 3 * 2 * A * S
    assert ours.restarts == 0 and 0 < ours.control < float(ours.bytes[-1])
    assert float(ours.bytes[-1]) > float(ours.transfers[-1]) * 4 * federation(0).problem.shared


def test_the_goal_is_reached_for_the_first_time():
    scores = torch.tensor([0.2, GOAL, 0.5, 0.9], dtype=torch.float64)
    run = Course(scores, 10 * torch.arange(4), torch.arange(4), torch.arange(4), 0, 0)
    assert run.rounds == 2 and run.first(run.transfers) == 10
    never = Course(scores[:1], *[torch.arange(1)] * 3, 0, 0)
    assert never.rounds == never.first(never.bytes) == math.inf


def test_those_who_crash_are_those_who_were_never_there():
    crashed, few = federation(1, leaves(share=SHARE, at=50)), federation(1, joins(share=SHARE, at=1e12))
    everyone = torch.arange(NODES)
    there = [f.fleet.trace.online(f.population, everyone, 60.0, 0) for f in (crashed, few)]
    assert torch.equal(*there) and int(there[0].sum()) == NODES - round(SHARE * NODES)
    assert torch.equal(crashed.split.train.offsets, few.split.train.offsets)


def test_the_rate_is_the_one_with_the_fewest_rounds(monkeypatch: pytest.MonkeyPatch):
    def made(where, rule, schedule, rounds):
        early = {0.1: 4, 0.3: 2, 1.0: math.inf, 2.0: 3}[float(rule.lr.value)]
        rising = torch.tensor([GOAL if k >= early else 0.0 for k in range(1, rounds + 1)], dtype=torch.float64)
        return Course(rising, *[torch.arange(rounds)] * 3, 0, 0)

    monkeypatch.setattr(experiment, "course", made)
    best, runs, swept = experiment.tuned(6, synchronous(cohort=S), steps=2)
    assert best == 0.3 and [run.rounds for run in runs] == [2, 2, 2]
    assert {lr: runs[0].rounds for lr, runs in swept.items()} == {0.1: 4, 0.3: 2, 1.0: math.inf, 2.0: 3}
