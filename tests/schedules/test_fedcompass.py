"""Groups of clients that finish together: FedCompass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import Seen, Tally, done
from torch import Tensor

import hanse as hs
from hanse.core.errors import ConfigError
from hanse.core.messages import Tensors
from hanse.engines.estimate import drive
from hanse.engines.simulation import Simulation
from hanse.fleet.population import Population
from hanse.fleet.traces import Finish
from hanse.methods import FedAvg, Scaffold
from hanse.schedules import fedcompass, synchronous
from hanse.schedules.staleness import constant

SMALL = fedcompass(q_min=2, q_max=10)


class hiccup(hs.fleet.always):
    """Everyone is there, but jobs of one client begun in a certain second take longer."""

    abstract: ClassVar[bool] = True  # of the tests, so not to be found by its name
    client: int = 1
    begun: float = 0.0
    extra: float = 0.0

    def finish(self, population: Population, clients: Tensor, start: Tensor, seconds: Tensor) -> Finish:
        hit = (clients == self.client) & (start >= self.begun) & (start < self.begun + 1)
        at, broken = super().finish(population, clients, start, seconds)
        return Finish(at + torch.where(hit, self.extra, 0.0), broken)


class jitter(hs.fleet.always):
    """Jobs take up to a tenth more or less, and one in ten three times as long."""

    abstract: ClassVar[bool] = True

    def finish(self, population: Population, clients: Tensor, start: Tensor, seconds: Tensor) -> Finish:
        u = population.streams.uniform("jitter", clients, (start * 1e6).long(), n=2)
        factor = 0.9 + 0.2 * u[:, 0] + 2 * (u[:, 1] < 0.1)
        return super().finish(population, clients, start, factor * seconds)


class Compass(Seen):
    """A run, with the jobs that the schedule asked for and its open groups after every round."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[tuple[float, int, int]] = []
        """When, client, local steps."""
        self.groups: list[int] = []

    def start(self, net: Simulation) -> None:
        super().start(net)
        send = net.send

        def listening(clients: Tensor, work: str, message: Tensors, steps: Tensor, patience: float) -> None:
            self.jobs += [(net.now, i, q) for i, q in zip(clients.tolist(), steps.tolist(), strict=True)]
            send(clients, work, message, steps, patience)

        net.send = listening  # type: ignore[method-assign, assignment]

    def write(self, record: Any) -> None:
        super().write(record)
        self.groups.append(len(self.net.notes["number"]))

    @property
    def cohorts(self) -> list[list[int]]:
        """Whose replies every round used, sorted."""
        return [sorted(cohort) for cohort in super().cohorts]

    @property
    def staleness(self) -> list[float]:
        """Mean over the replies of every round."""
        return [record["staleness"] for record in self.records]

    @property
    def balance(self) -> bool:
        """Whether every job that was sent has been aggregated, given up, or is still to be."""
        net, clock = self.net, self.net.clock
        return bool(clock.tickets == net.updates + len(net.arrived) + len(net.out) + clock.lost)


def federation(steps: Sequence[float], trace: hs.fleet.Trace | None = None, loss: float = 0.0) -> hs.Federation:
    """Clients of which a local step takes so many seconds."""
    m = len(steps)
    fleet = hs.fleet.devices(step=hs.fleet.listed(tuple(steps)), trace=trace or hs.fleet.always(), loss=loss)
    return hs.Federation(hs.tasks.quadratics(count=m, dimension=1), m, hs.natural(), fleet, dtype="float64")


def go(
    clients: hs.Federation | Sequence[float], schedule: fedcompass = SMALL, rounds: int = 30, rule: FedAvg | None = None, **how: Any
) -> Compass:
    seen, where = Compass(), clients if isinstance(clients, hs.Federation) else federation(clients)
    engine = hs.engines.local(**{"path": "vmap", "chunk": where.clients, "workers": 1, "threads": 1, "shortcuts": False} | how)
    rule = rule or Tally(weights="uniform")
    hs.run(where, rule, schedule, rounds=rounds, evaluate=0, engine=engine, writers=[seen], on_start=seen.start)
    return seen


# ---- by hand: s = 1 and 3 or 6 seconds, Qmin = 2, Qmax = 10, lam = 1.2


def test_a_client_joins_a_group_with_as_many_steps_as_it_can_take_by_then():
    """Client 1 comes at 30 for the first time. Client 0 is expected back at 40: time for three steps."""
    seen = go([1, 3], rounds=7)
    assert seen.jobs[:7] == [(0, 0, 10), (0, 1, 10), (10, 0, 10), (20, 0, 10), (30, 0, 10), (30, 1, 3), (40, 0, 10)]
    assert seen.seconds == [10, 20, 30, 30, 40, 50, 60] and seen.cohorts == [[0], [0], [0], [1], [0, 1], [0, 1], [0, 1]]
    assert seen.staleness == [0, 0, 0, 3, 0.5, 0, 0]


def test_a_client_that_can_join_none_aims_at_the_time_when_the_fastest_could_be_back_again():
    """At 60, client 0 is expected at 70, where client 1 has made one step. Its group closes at 72 at the latest, and client 0 could
    then be back at 82, time for three steps; at 70 it joins client 1, who is expected at 78.
    """
    seen = go([1, 6], rounds=10)
    assert [job for job in seen.jobs if job[0] >= 60][:4] == [(60, 0, 10), (60, 1, 3), (70, 0, 8), (78, 0, 10)]
    assert seen.seconds[6:9] == [60, 70, 78] and seen.cohorts[6:9] == [[1], [0], [0, 1]]


def test_who_is_late_starts_again_at_once_and_counts_when_the_next_group_is_closed():
    """Client 1, expected at 49, comes at 54. The group was closed at 52. Its speed is now 0.1 * 3 + 0.9 * 14 / 3 = 4.5: it cannot
    join client 0, expected at 62, and aims at 64 + 10, time for four steps. Then client 0 joins it until 72.
    """
    seen = go(federation([1, 3], hiccup(client=1, begun=40, extra=5)), rounds=9)
    assert seen.cohorts[4:] == [[0, 1], [0], [0, 1], [0, 1], [0, 1]]
    assert seen.seconds[4:] == [40, 52, 62, 72, 82]
    assert [job for job in seen.jobs if 40 <= job[0] < 72] == [(40, 0, 10), (40, 1, 3), (52, 0, 10), (54, 1, 4), (62, 0, 10)]
    assert seen.staleness[6] == 0.5, "the late update had seen one version less"
    assert seen.net.notes["speed"].tolist() == pytest.approx([1e9, 0.1 * (0.1 * 4.5e9 + 0.9 * 3e9) + 0.9 * 3e9])


def test_a_late_update_does_not_wait_where_no_group_is_open():
    """Nobody has arrived when the only group is closed at 22; the model stays as it is until the late client comes at 25."""
    seen = go(federation([1], hiccup(client=0, begun=10, extra=5)), rounds=3)
    assert seen.seconds == [10, 25, 35] and seen.cohorts == [[0], [0], [0]]


def test_whose_reply_is_lost_leaves_its_group_and_is_asked_again():
    """Client 1's job of 40 never returns: its group is closed at 52 without it, and it is given up at 70."""
    where = federation([1, 3], hiccup(client=1, begun=40, extra=float("inf")))
    seen = go(where, fedcompass(q_min=2, q_max=10, patience=30), rounds=9)
    assert seen.seconds[4:] == [40, 52, 62, 72, 82] and seen.cohorts[5:] == [[0], [0], [0], [0, 1]]
    assert [job for job in seen.jobs if job[0] > 62] == [(70, 1, 4), (72, 0, 10)] and seen.net.clock.lost == 1 and seen.balance


def test_a_group_whose_last_client_is_lost_need_not_wait_for_its_time():
    """Client 1's job of 40 is given up at 71, the group's time is 90, and client 0 has been waiting since 50."""
    where = federation([1, 3], hiccup(client=1, begun=40, extra=float("inf")))
    seen = go(where, fedcompass(q_min=2, q_max=10, lam=5, patience=31), rounds=6)
    assert seen.seconds == [10, 20, 30, 30, 40, 71] and seen.cohorts[-1] == [0]


def test_where_nothing_can_come_the_round_stays_empty_and_who_is_there_starts_again():
    seen = go(federation([1], hiccup(client=0, begun=10, extra=float("inf"))), rounds=3)
    assert seen.seconds == [10, 22, 32] and seen.cohorts == [[0], [], [0]] and torch.equal(seen.models[0], seen.models[1])


# ---- laws


@pytest.mark.parametrize("steps", [(0.01, 0.02, 0.03, 0.04, 0.05), (0.1, 0.2, 0.3, 0.4), (0.4, 0.13, 0.1, 0.37)])
def test_speeds_within_the_limits_of_steps_end_up_in_one_group(steps):
    seen, m = go(steps, fedcompass(), rounds=30), len(steps)
    assert seen.cohorts[-18:] == [list(range(m))] * 18 and seen.staleness[-18:] == [0] * 18
    assert {q for _, _, q in seen.jobs} <= set(range(20, 101)) and seen.balance


def test_equal_speeds_are_fedavg_bit_for_bit():
    """Once the clients, whose first updates are aggregated one by one, have started from the same model."""
    where = hs.Federation(hs.tasks.digits(hidden=4), 4, hs.dirichlet(0.5), hs.fleet.devices(step=0.3), dtype="float64")
    rule = FedAvg(lr=0.3, batch=16, steps=10)
    seen = go(where, fedcompass(q_min=2, q_max=10, alpha=1, staleness=constant()), 9, rule, path="stacked")
    assert seen.cohorts == [[0], [1], [2], [3], *[[0, 1, 2, 3]] * 5]
    average = Seen()

    def from_there(net: Simulation) -> None:
        average.start(net)
        net.round, net.state = 5, {"x": seen.models[4]}  # round 5 has drawn its batches under its own number

    engine = hs.engines.local("stacked", 4, 1, 1, shortcuts=False)
    hs.run(where, rule, synchronous(cohort=4), rounds=9, evaluate=0, engine=engine, writers=[average], on_start=from_there)
    assert all(torch.equal(a, b) for a, b in zip(seen.models[5:], average.models, strict=True))


def test_twenty_times_as_slow_still_means_few_groups_and_little_staleness():
    seen = go((0.01, 0.02, 0.05, 0.1, 0.2), fedcompass(), rounds=100)
    stale = torch.cat([reply.versions for reply in seen.replies])
    now = torch.cat([torch.full((len(reply),), round) for reply, round in zip(seen.replies, seen.rounds, strict=True)])
    assert max(seen.groups) <= 3 and float((now - stale).double().mean()) < 1
    assert {q for _, _, q in seen.jobs} <= set(range(20, 101)) and seen.balance


def test_without_a_choice_of_steps_groups_are_small_and_updates_stale():
    seen = go((0.1, 0.15, 0.2, 0.3, 0.4), fedcompass(q_min=50, q_max=50), rounds=150)
    sizes = torch.tensor([len(c) for c in seen.cohorts], dtype=torch.float64)
    assert {q for _, _, q in seen.jobs} == {50}
    assert float(sizes.mean()) == pytest.approx(2, abs=0.1)
    assert float(sizes @ torch.tensor(seen.staleness, dtype=torch.float64) / sizes.sum()) == pytest.approx(1.4, abs=0.1)


@pytest.mark.parametrize(("loss", "patience"), [(0.0, float("inf")), (0.2, 4.0)])
def test_every_update_that_arrives_is_aggregated_once(loss, patience):
    """With a tenth of jitter, late clients and lost replies. Every client sends 1 and counts its jobs."""
    where = federation((0.01, 0.02, 0.03, 0.04, 0.05), jitter(), loss)
    seen = go(where, fedcompass(alpha=1, staleness=constant(), patience=patience), rounds=60)
    assert seen.balance and (seen.net.clock.lost > 0) == (loss > 0)
    jobs = [(job[0], job[2]) for record in seen.records for job in record["jobs"] if job[6] is not None]
    assert len(set(jobs)) == len(jobs) == seen.net.updates == sum(map(len, seen.cohorts))
    moved = float(seen.models[-1] - seen.net.problem.start) * 5
    assert moved == pytest.approx(seen.net.updates) and sum(done(seen)) >= seen.net.updates
    late = [record for record in seen.records if len(record["cohort"]) > len(set(record["cohort"]))]
    assert late, "somebody was late and in time for the same aggregation"


def test_stale_updates_count_less():
    """Every client sends 1, so the model moves by what the updates count: alpha / m * (1 + u)^-1/2 each."""
    seen = go((0.01, 0.02, 0.05, 0.1, 0.2), fedcompass(), rounds=40)
    models = [seen.net.problem.start, *seen.models]
    for before, after, reply, round in zip(models[:-1], models[1:], seen.replies, seen.rounds, strict=True):
        u = (round - reply.versions).double()
        assert float(after - before) == pytest.approx(float((0.9 / 5 / (1 + u).sqrt()).sum()), rel=1e-12)
        assert float(after - before) <= 0.9 * len(reply) / 5 + 1e-12
    assert max(seen.staleness) > 3


# ---- whoever takes part


@given(
    steps=st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6),
    limits=st.tuples(st.integers(1, 40), st.integers(0, 100)),
    lam=st.sampled_from([1.0, 1.2, 3.0]),
    tired=st.booleans(),
)
@settings(max_examples=10)
def test_any_speeds_within_any_limits(steps, limits, lam, tired):
    q_min, q_max = limits[0], sum(limits)
    where = federation(steps, jitter() if tired else None)
    seen = go(where, fedcompass(q_min=q_min, q_max=q_max, lam=lam), rounds=25)
    assert len(seen.records) == 25 and all(seen.cohorts) and seen.balance
    assert all(q_min <= q <= q_max for _, _, q in seen.jobs)


TRACES = {
    "by time": hs.fleet.bernoulli(0.5, slot=3.0),
    "by time, losing work": hs.fleet.bernoulli(0.7, slot=3.0, lost=True),
    "by round": hs.fleet.bernoulli(0.5),
}


@pytest.mark.parametrize("trace", TRACES)
def test_clients_that_come_and_go(trace):
    seen = go(federation((0.1, 0.2, 0.3, 0.4), TRACES[trace]), rounds=60)
    assert seen.balance and set(range(4)) == {i for cohort in seen.cohorts for i in cohort}
    assert all(2 <= q <= 10 for _, _, q in seen.jobs)


def test_a_fleet_without_speeds():
    """Everything is done in no time, which counts as a nanosecond a step."""
    where = hs.Federation(hs.tasks.quadratics(count=4, dimension=1), 4, hs.natural(), dtype="float64")
    seen = go(where, rounds=8)
    assert seen.cohorts[4:] == [[0, 1, 2, 3]] * 4 and seen.seconds == [0] * 8


def test_limits_the_wrong_way_round_are_refused():
    with pytest.raises(ConfigError, match=r"fedcompass.q_min: 20 is not allowed: at most q_max, 10"):
        fedcompass(q_max=10)


# ---- resuming


class Memory:
    """Snapshots after every round."""

    def __init__(self) -> None:
        self.snapshots: list[Tensors] = []

    def __call__(self, net: Simulation) -> None:
        net.clock.ended.clear()
        self.snapshots.append({n: t.clone() for n, t in net.snapshot().items()})


RESUMED: dict[str, tuple[FedAvg, hs.codecs.Codec, hs.Federation, fedcompass]] = {
    "late clients": (
        Tally(), hs.codecs.identity(), federation((0.1, 0.2, 0.25, 0.4), jitter()), SMALL
    ),
    "lost replies": (
        Tally(), hs.codecs.identity(), federation((0.1, 0.2, 0.3, 0.4), jitter(), 0.2), fedcompass(q_min=2, q_max=10, patience=8)
    ),
    "coming and going": (
        Tally(), hs.codecs.identity(), federation((0.1, 0.2, 0.3, 0.4), hs.fleet.bernoulli(0.5, slot=3.0)), SMALL
    ),
    "rounds missed": (Tally(), hs.codecs.identity(), federation((0.1, 0.2, 0.3), hs.fleet.bernoulli(0.4)), SMALL),
    "the same instant": (Tally(), hs.codecs.identity(), federation((0.1, 0.1, 0.2, 0.2)), SMALL),
    "client state and a codec": (
        Scaffold(lr=0.1, batch=1), hs.codecs.topk(0.5), federation((0.1, 0.2, 0.4)), fedcompass(q_min=2, q_max=4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_goes_on_identically_from_every_round(case):
    rule, codec, where, schedule = RESUMED[case]
    engine, rounds = hs.engines.local("vmap", 8, 1, 1), 12

    def network(on_commit: Memory) -> Simulation:
        return Simulation(where, rule, engine, codec, seed=0, rounds=rounds, on_commit=on_commit)

    whole = Memory()
    drive(schedule.run(network(whole), rule))
    assert len(whole.snapshots) == rounds
    for k, saved in enumerate(whole.snapshots[:-1]):
        rest = Memory()
        net = network(rest)
        net.restore(saved)
        drive(schedule.run(net, rule))
        for one, other in zip(whole.snapshots[k + 1 :], rest.snapshots, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())
