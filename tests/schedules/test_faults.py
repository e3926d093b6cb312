"""Whatever goes wrong, no schedule hangs, strands a reply or counts one twice: hundreds of random scripts of faults."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import hanse as hs
from hanse.core.context import Context
from hanse.core.messages import Reply, Upload
from hanse.core.samples import Batch
from hanse.engines.estimate import drive
from hanse.engines.simulation import Simulation
from hanse.fleet.clock import Clock, Events
from hanse.methods.base import State

CLIENTS, ROUNDS = 8, 12
SCHEDULES = {
    "synchronous": "synchronous(cohort=4)",
    "over-selection": "synchronous(cohort=4, over=0.5)",
    "deadline": "synchronous(cohort=4, deadline=1.0, least=2)",
    "cyclic": "cyclic(cohort=3)",
    "fedbuff": "fedbuff(buffer=3)",
    "fedbuff, few at work": "fedbuff(buffer=3, cohort=4, oldest=2)",
    "fedasync": "fedasync",
    "unbiased": "fedasync(weights='unbiased')",
    "fedfix": "fedfix(window=0.7)",
    "fedcompass": "fedcompass(q_min=2, q_max=8)",
    "anarchic": "anarchic(m=2, pause=0.5)",
}


class Flat:
    """A gradient path on which nothing moves, so that a run costs its events alone."""

    name = "loop"
    descend = None

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(w), torch.ones(len(w))


class Tally(hs.methods.FedAvg):
    """FedAvg that counts: every client remembers how many jobs it has done and tells the server by how many that rose."""

    abstract: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ("done",)

    def train(self, ctx: Context) -> Upload:
        before = ctx.state["done"].clone()
        ctx.state["done"] = before + 1
        delta = ctx.displacement(self.direction)
        return ctx.upload(torch.ones(len(ctx.ids)), delta=delta, risen=ctx.state["done"] - before)

    def step(self, state: State, reply: Reply, round: int) -> State:
        return {**super().step(state, reply, round), "told": state["told"] + reply.sums["risen"]}

    def init(self, problem: Any) -> State:
        state = super().init(problem)
        return {**state, "told": torch.zeros_like(state["x"])}


federation = hs.Federation(hs.tasks.digits(hidden=1), clients=CLIENTS)
amounts = st.sampled_from(["0", "0.5", "evenly(2.0, 0.2)", "exponential(0.5)", "lognormal(0.5, 1.0)"])
chances = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
traces = st.sampled_from(
    [
        "always",
        "bernoulli(0.5)",
        "bernoulli(0.05)",
        "bernoulli(0.6, slot=0.5)",
        "bernoulli(0.6, slot=0.5, lost=True)",
        "cyclic(rate=0.3, period=6, slot=0.3)",
        "crashes(every=2.0, lasts=1.0, slot=0.25)",
        "crashes(every=2.0, lasts=inf, slot=0.25)",
        "slowdowns(rate=0.5, factor=5.0, slot=0.25)",
    ]
)
patience = st.sampled_from([None, 0.1, 1.0, 5.0])
fleets = st.builds(
    "devices(job={}, latency={}, up={}, loss={}, duplicates={}, trace={})".format,
    amounts,
    st.sampled_from(["0", "0.01"]),
    st.sampled_from(["inf", "0.1"]),
    chances,
    chances,
    traces,
)


class Watched(Simulation):
    """A network that fails where a schedule waits for ever without anything happening."""

    waits = 0

    async def wait(self, *args: Any, **kwargs: Any) -> Events:
        self.waits += 1
        assert self.waits < 2_000, "the schedule goes round in circles"
        return await super().wait(*args, **kwargs)


def play(fleet: str, schedule: str, patience: float | None) -> Watched:
    """Run a schedule through the faults of a fleet; every job that ends is left in ``net.clock.ended``."""
    federation.fleet = hs.fleet.Fleet.parse(fleet)
    engine = hs.engines.local(path="loop", chunk=CLIENTS, workers=1, threads=1)
    net = Watched(federation, Tally(steps=1), engine, hs.codecs.identity(), seed=0, rounds=ROUNDS)
    net.paths["loop"] = Flat()
    part = hs.schedules.Schedule.parse(schedule)
    if patience is not None and "patience" in type(part).model_fields:
        part = type(part)(**{**{n: v for n, v in part if n in part.model_fields_set}, "patience": patience})
    drive(part.run(net, net.method))
    return net


def tickets(clock: Clock) -> Counter[int]:
    return Counter(t for jobs, _, _ in clock.ended for t in jobs["ticket"].tolist())


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(fleet=fleets, patience=patience)
def test_every_job_ends_once_and_every_reply_is_counted_once(name: str, fleet: str, patience: float | None) -> None:
    net = play(fleet, SCHEDULES[name], patience)
    clock = net.clock
    assert net.round == ROUNDS
    ended, under_way = tickets(clock), [*clock.live["ticket"].tolist(), *clock.arrived["ticket"].tolist()]
    assert not ended or max(ended.values()) == 1, "a job ended twice"
    assert sorted([*ended, *under_way]) == list(range(clock.tickets)), "a job was stranded, or made up"
    used = [t for jobs, _, was_used in clock.ended if was_used for t in jobs["ticket"].tolist()]
    assert net.updates == len(used) == int(net.taken.sum())
    assert torch.equal(net.state["told"], torch.full_like(net.state["told"], len(used))), "the server's books do not balance"


@pytest.mark.parametrize("name", ["fedbuff", "fedfix", "synchronous"])
def test_replies_that_come_twice_are_paid_for_and_counted_once(name: str) -> None:
    once, twice = (play(f"devices(job=evenly(2.0, 0.2), duplicates={p})", SCHEDULES[name], None) for p in (0, 1))
    assert twice.updates == once.updates and torch.equal(twice.state["told"], once.state["told"])
    assert twice.clock.duplicates == once.updates + len(once.arrived) and twice.clock.up == 2 * once.clock.up


def test_a_reply_that_comes_after_it_was_given_up_is_paid_for_and_not_used() -> None:
    net = play("devices(job=listed((9, 1, 1, 1, 1, 1, 1, 1)))", "fedbuff(buffer=3, cohort=2)", 5.0)
    assert net.clock.late > 0 and net.taken[0] == 0


def test_somebody_who_never_returns_holds_up_nobody() -> None:
    net = play("devices(job=listed((1e9, 1, 1, 1, 1, 1, 1, 1)))", "fedbuff(buffer=7)", None)
    assert net.round == ROUNDS and net.taken.tolist() == [0, *[ROUNDS] * 7] and net.now == ROUNDS


def test_everybody_away_for_a_while_is_waited_for() -> None:
    net = play("devices(job=1, trace=cyclic(rate=0.01, period=50, slot=1))", "fedbuff(buffer=1, cohort=1)", None)
    assert net.updates == ROUNDS and net.now > 2 * ROUNDS


def test_a_reply_for_a_version_long_gone_moves_nothing_but_is_in_the_books() -> None:
    net = play("devices(job=listed((9.5, 1, 1, 1, 1, 1, 1, 1)))", "fedbuff(buffer=7, oldest=3)", None)
    assert net.taken[0] == 1 and float(net.state["told"][0]) == net.updates
