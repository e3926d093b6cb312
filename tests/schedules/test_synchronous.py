"""Rounds with a barrier."""

from typing import ClassVar

import pytest
import torch

import hanse as hs
from hanse.core.errors import ConfigError

ENGINE = hs.engines.local("stacked", 8, 1, 1)


@pytest.fixture(scope="module")
def federation() -> hs.Federation:
    return hs.Federation(hs.tasks.digits(hidden=4), clients=8, fleet=hs.fleet.phones())


def go(federation: hs.Federation, schedule: hs.schedules.Schedule, rounds: int = 30) -> hs.Run:
    return hs.run(federation, hs.methods.FedAvg(steps=1), schedule, rounds=rounds, evaluate=0, engine=ENGINE)


def test_a_fixed_cohort_every_round(federation: hs.Federation) -> None:
    run = go(federation, hs.schedules.synchronous(3))
    cohorts = [r["cohort"] for r in run.history]
    assert all(len(set(c)) == 3 and c == sorted(c) for c in cohorts) and len({tuple(c) for c in cohorts}) > 10
    assert torch.equal(run.clients["rounds"], torch.bincount(torch.tensor(cohorts).flatten(), minlength=8))
    assert [r["round"] for r in run.history] == list(range(1, 31))


def test_what_an_accountant_is_told() -> None:
    """Where replies are dropped, or a round thrown away, it is not chance alone that decides who counts."""
    assert hs.schedules.synchronous(3).sampling() == (3, "fixed")
    assert hs.schedules.synchronous(3, draw="bernoulli").sampling() == (3, "bernoulli")
    for text in ("synchronous(over=0.1)", "synchronous(deadline=9)", "synchronous(least=1)", "cyclic", "fedbuff"):
        assert hs.schedules.Schedule.parse(text).sampling() is None
    barriers = {name for name, schedule in hs.schedules.Schedule.registry().items() if schedule.barrier}
    assert barriers >= {"synchronous", "cyclic"} and not barriers & {"fedasync", "fedbuff", "fedfix", "fedcompass", "anarchic"}


def test_everyone_every_round(federation: hs.Federation) -> None:
    assert all(r["cohort"] == list(range(8)) for r in go(federation, hs.schedules.synchronous(8), 2).history)


def test_more_than_there_are_is_refused(federation: hs.Federation) -> None:
    with pytest.raises(ConfigError, match=r"synchronous.cohort: 9 is not allowed: at most the number of clients, 8"):
        go(federation, hs.schedules.synchronous(9))


def test_bernoulli_draws_each_client_by_itself(federation: hs.Federation) -> None:
    """Cohorts of every size, none too; a round without anyone costs nothing and changes nothing."""
    run = go(federation, hs.schedules.synchronous(2, draw="bernoulli"), 200)
    sizes = [len(r["cohort"]) for r in run.history]
    assert sum(sizes) / 200 == pytest.approx(2, abs=4 * (8 * 0.25 * 0.75 / 200) ** 0.5)
    assert {0, 1, 2, 3, 4} <= set(sizes)
    assert int(run.clients["rounds"].sum()) == sum(sizes)
    empty = [t for t in range(1, 200) if not sizes[t]]
    for t in empty:
        before, now = run.history[t - 1], run.history[t]
        assert (now["seconds"], now["bytes_down"], now["bytes_up"]) == (before["seconds"], before["bytes_down"], before["bytes_up"])


def test_a_round_takes_as_long_as_its_slowest_client(federation: hs.Federation) -> None:
    everyone = go(federation, hs.schedules.synchronous(8), 1).history[0]["seconds"]
    alone = [
        hs.run(
            hs.Federation(hs.tasks.digits(hidden=4), clients=8, fleet=hs.fleet.phones()),
            hs.methods.FedAvg(steps=1),
            Only(client=i),
            rounds=1,
            engine=ENGINE,
        ).history[0]["seconds"]
        for i in range(8)
    ]
    assert everyone == pytest.approx(max(alone)) and min(alone) < 0.98 * max(alone)


class Only(hs.schedules.Schedule):
    """Asks one client."""

    abstract: ClassVar[bool] = True
    client: int = 0

    async def run(self, net: hs.schedules.Network, method: hs.methods.Method) -> None:
        state, _ = net.begin(method.init(net.problem))
        while net.going():
            reply = await net.ask(torch.tensor([self.client]), "train", method.message(state))
            state = method.step(state, reply, net.round)
            await net.commit(state)
