"""Steps whenever some replies are in: FedBuff and FedAsync."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import Tally, bowls, done, fleet, watch
from torch import Tensor

import hanse as hs
from hanse.methods import FedAvg
from hanse.schedules import fedasync, fedbuff, synchronous
from hanse.schedules.periods import measured, unknown_periods
from hanse.schedules.staleness import constant, polynomial

TAU = [round((1.0 - 0.8 * i / 9) * 1e9) for i in range(10)]
"""Nanoseconds of a job of each of ten clients in F-80."""


def by_hand(federation: hs.Federation, buffer: int, rounds: int, a: float, alpha: float = 1.0) -> list[Tensor]:
    """The boxes of the papers as a loop over arrivals: three steps of rate 0.1, s(u) = (1 + u)^-a."""
    curve, centre = federation.task.samples().unbind(1)
    x, models, held = federation.problem.start, [], []
    jobs = {i: (tau, 0, x) for i, tau in enumerate(TAU)}
    while len(models) < rounds:
        now = min(arrives for arrives, _, _ in jobs.values())
        free = [i for i in jobs if jobs[i][0] == now]
        held += [(i, *jobs[i][1:]) for i in free]
        while len(held) >= buffer:
            taken, held = held[:buffer], held[buffer:]
            n, delta = len(models), torch.zeros_like(x)
            for i, rho, start in taken:
                delta += alpha * (1 + n - rho) ** -a * ((1 - 0.1 * curve[i]) ** 3 - 1) * (start - centre[i])
            x = x + delta / buffer
            models.append(x)
        jobs |= {i: (now + TAU[i], len(models), x) for i in free}
    return models[:rounds]


@pytest.mark.parametrize("a", [0.0, 0.5])
@pytest.mark.parametrize("buffer", [1, 3, 10])
def test_it_follows_the_algorithm_of_the_paper(buffer, a):
    federation = bowls()
    schedule = fedbuff(buffer=buffer, staleness=polynomial(a))
    seen = watch(federation, schedule, FedAvg(lr=0.1, steps=3), 60 // buffer)
    expected = torch.stack(by_hand(federation, buffer, 60 // buffer, a))
    torch.testing.assert_close(torch.stack(seen.models), expected, rtol=0, atol=1e-12)


def test_fedasync_is_a_buffer_of_one():
    federation, rule = bowls(), FedAvg(lr=0.1, steps=3)
    one, other = (watch(federation, s, rule, 40).models for s in (fedbuff(buffer=1), fedasync(alpha=1)))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    damped = torch.stack(watch(federation, fedasync(), rule, 40).models)
    torch.testing.assert_close(damped, torch.stack(by_hand(federation, 1, 40, 0.5, alpha=0.6)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [6, 4])
def test_a_buffer_for_everyone_and_equal_speeds_make_it_fedavg_bit_for_bit(chunk):
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, partition=hs.dirichlet(0.5), fleet=fleet(job="0.7"))
    rule = FedAvg(lr=0.3, batch=16)
    for schedule in (fedbuff(buffer=6), fedbuff(buffer=6, weights="unbiased")):
        buff, avg = (watch(federation, s, rule, 4, chunk=chunk) for s in (schedule, synchronous(cohort=6)))
        assert all(torch.equal(a, b) for a, b in zip(buff.models, avg.models, strict=True))
        assert buff.seconds == avg.seconds and buff.records[-1]["bytes_up"] == avg.records[-1]["bytes_up"]


def test_clients_never_wait_for_one_another():
    """Without a barrier client i delivers floor(T / tau_i) times in T seconds, a share of 1 / tau_i."""
    seen = watch(bowls(), fedasync(), rounds=120)
    deliveries, _ = seen.counted()
    time = seen.net.clock.time
    for i, tau in enumerate(TAU):
        assert time // tau - 1 <= deliveries[i] <= time // tau
    assert int(deliveries.sum()) == 120


def test_equal_counts_favour_fast_clients_and_unbiased_ones_do_not():
    """One client is twice as fast: of three steps, two are its. Counted by how rarely they deliver, both have the same mean weight
    a step, as soon as the means over the fast one's gaps, which alternate between one and two, have settled.
    """
    federation = bowls(clients=2, job="listed((1, 0.5))")
    deliveries, plain = watch(federation, fedasync(alpha=1, staleness=constant()), rounds=30).counted()
    assert deliveries.tolist() == plain.tolist() == [10, 20]
    deliveries, counted = watch(federation, fedasync(weights="unbiased"), rounds=150).counted(120)
    assert deliveries.tolist() == [10, 20]
    assert (counted / 30).tolist() == pytest.approx([0.5, 0.5], rel=0.01)


def test_a_client_that_is_in_the_buffer_is_already_at_work_again():
    """The fast client fills the buffer with three of its own, each from the same model; the slow one still comes in time."""
    seen = watch(bowls(clients=2, job="listed((1, 0.3))"), fedbuff(buffer=3), rounds=4)
    assert seen.cohorts[0] == [1, 1, 1] and seen.seconds[0] == pytest.approx(0.9)
    assert sorted(seen.cohorts[1]) == [0, 1, 1]
    assert [len(cohort) for cohort in seen.cohorts] == [3] * 4


def test_only_so_many_are_at_work_at_a_time():
    seen = watch(bowls(), fedbuff(buffer=2, cohort=3), rounds=40)
    out, arrived = len(seen.net.out), len(seen.net.arrived)
    assert out <= 3 and seen.net.clock.tickets == 80 + out + arrived
    assert max(record["staleness"] for record in seen.records) <= 2  # so few others step meanwhile
    assert {c for cohort in seen.cohorts for c in cohort} == set(range(10))


def test_what_is_too_old_does_not_move_the_model_but_is_kept_in_the_books():
    """Staleness of the slow client: 20 steps of the fast ones. Its update has weight 0, and what it remembers still counts."""
    federation = bowls(clients=3, job="listed((2, 0.2, 0.2))")
    fresh, stale = (watch(federation, fedasync(alpha=1, oldest=oldest), rounds=25) for oldest in (None, 10))
    late = [r["cohort"] for r in stale.records].index([0])
    assert stale.records[late]["staleness"] > 10
    before, after = stale.models[late - 1], stale.models[late]
    assert torch.equal(before, after) and done(stale)[0] == 1
    assert not torch.equal(fresh.models[late - 1], fresh.models[late])


def test_a_reply_given_up_does_not_count():
    """Client 0 needs longer than anybody waits: its replies are paid for and thrown away."""
    seen = watch(bowls(clients=3, job="listed((2, 0.2, 0.2))"), fedbuff(buffer=2, patience=1.5), rounds=40)
    assert 0 not in {c for cohort in seen.cohorts for c in cohort} and done(seen)[0] == 0
    assert seen.net.clock.lost == seen.net.clock.tickets - seen.records[-1]["updates"] - len(seen.net.out) - len(seen.net.arrived)


@pytest.mark.parametrize("field", ["alpha=0.5", "oldest=3", "staleness=constant()"])
def test_a_discount_would_bias_unbiased_weights(field):
    with pytest.raises(hs.ConfigError, match=f"{field.split('=')[0]} is not allowed with weights='unbiased'"):
        hs.schedules.Schedule.parse(f"fedbuff(weights='unbiased', {field})")


def test_alpha_of_fedasync_is_a_share():
    with pytest.raises(hs.ConfigError, match=r"alpha"):
        fedasync(alpha=1.5)
    with pytest.raises(hs.ConfigError, match=r"buffer"):
        hs.schedules.Schedule.parse("fedasync(buffer=2)")


# ---- the measured period


@given(period=st.integers(1, 50), first=st.integers(0, 20))
def test_a_client_that_delivers_every_so_many_rounds_has_that_period(period, first):
    notes, i, n = unknown_periods(3), torch.tensor([1]), first + period - 1
    for _ in range(5):
        notes, found = measured(notes, i, torch.tensor([n - period + 1]), n)
        assert float(found) == pytest.approx(period, abs=1e-12)
        n += period
    assert notes["period"].tolist()[::2] == [0, 0] and notes["seen"].tolist() == [-1, n - period, -1]


def test_unequal_gaps_are_averaged_with_a_weight_of_a_tenth_for_the_new_one():
    notes, i, expected = unknown_periods(1), torch.tensor([0]), 4.0
    for n, gap in ((3, None), (4, 1), (9, 5), (11, 2), (30, 19)):
        expected = expected if gap is None else 0.9 * expected + 0.1 * gap
        notes, found = measured(notes, i, torch.tensor([0]), n)
        assert float(found) == pytest.approx(expected, abs=1e-12)


def test_two_deliveries_at_once_share_their_gap():
    """Six rounds with two deliveries in the last one: three rounds each."""
    once = {"period": torch.tensor([3.0], dtype=torch.float64), "seen": torch.tensor([5])}
    notes, found = measured(once, torch.tensor([0, 0]), torch.tensor([6, 8]), 11)
    assert found.tolist() == pytest.approx([3, 3], abs=1e-12) and notes["seen"].tolist() == [11]
    assert once["seen"].tolist() == [5], "notes are never changed in place"


def test_a_first_period_is_that_of_the_job_itself():
    """A client that turns up late has not been slow."""
    _, found = measured(unknown_periods(4), torch.tensor([2, 3]), torch.tensor([97, 0]), 99)
    assert found.tolist() == [3, 100]


def test_a_run_with_notes_goes_on_identically(tmp_path):
    """Stopped in the middle and resumed: the same models, with what was under way and the measured periods brought back."""
    federation, rule = bowls(), FedAvg(lr=0.1, steps=3)
    schedule = fedbuff(buffer=2, weights="unbiased")
    whole = hs.run(federation, rule, schedule, rounds=20, evaluate=0, engine=hs.engines.local("vmap", 10, 1, 1))

    class Stop:
        def start(self, net):
            self.net = net

        def write(self, record):
            self.net.stopping = record["round"] == 9

        def close(self):
            pass

    stop = Stop()
    hs.run(
        federation,
        rule,
        schedule,
        rounds=20,
        evaluate=0,
        engine=hs.engines.local("vmap", 10, 1, 1),
        out=tmp_path,
        writers=[stop],
        on_start=stop.start,
    )
    rest = hs.resume(tmp_path, federation)
    assert all(torch.equal(whole.weights[n], rest.weights[n]) for n in whole.weights)
    assert [r["cohort"] for r in rest.history] == [r["cohort"] for r in whole.history] and len(rest.history) == 20


def test_the_tally_of_these_tests_counts_jobs():
    seen = watch(bowls(), synchronous(cohort=10), Tally(), 3)
    assert done(seen) == [3] * 10 and torch.equal(seen.models[-1] - seen.net.problem.start, torch.full((10,), 3.0))
