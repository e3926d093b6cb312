"""Steps at fixed times with whatever has arrived."""

from __future__ import annotations

import math

import pytest
import torch
from small_runs import F80, bowls, done, fleet, watch
from torch import Tensor

import hanse as hs
from hanse.methods import FedAvg, Scaffold
from hanse.schedules import fedfix, synchronous

TAU = [1.0 - 0.8 * i / 9 for i in range(10)]
"""Seconds of a job of each of ten clients in F-80."""


def windows(tau: float, dt: float) -> int:
    """ceil(tau / dt), with a quotient that is whole up to rounding taken as whole."""
    return math.ceil(tau / dt - 1e-9)


@pytest.fixture(scope="module")
def digits() -> hs.Federation:
    """Ragged clients in single precision, where another order of additions would show."""
    return hs.Federation(hs.tasks.digits(hidden=8), clients=6, partition=hs.dirichlet(0.5), fleet=fleet())


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("chunk", [6, 4])
@pytest.mark.parametrize("weights", ["unbiased", "plain"])
@pytest.mark.parametrize("window", [1.0, 1.7])
def test_windows_as_long_as_the_slowest_job_make_it_fedavg_bit_for_bit(digits, window, weights, chunk):
    rule = FedAvg(lr=0.3, batch=16)
    fix = watch(digits, fedfix(window=window, weights=weights), rule, 4, chunk=chunk)
    avg = watch(digits, synchronous(cohort=6), rule, 4, chunk=chunk)
    assert same(fix.models, avg.models)
    assert fix.seconds == pytest.approx([window * n for n in (1, 2, 3, 4)])


def test_what_clients_keep_is_that_of_fedavg_too(digits):
    seen = [watch(digits, schedule, Scaffold(lr=0.3), 3) for schedule in (fedfix(window=1.0), synchronous(cohort=6))]
    one, other = (s.net.kept.read(torch.arange(6))["c"] for s in seen)
    assert torch.equal(one, other) and bool(one.any())


@pytest.mark.parametrize("tau", [1, 2 / 3, 0.3333333335, 1 / 7])
def test_equal_jobs_and_windows_of_that_length_make_it_fedavg_bit_for_bit(tau):
    """Also where that is not a whole number of nanoseconds: a reply due at the end of a window is in it, in every window."""
    federation = hs.Federation(hs.tasks.digits(hidden=4), clients=4, partition=hs.dirichlet(0.5), fleet=fleet(job=tau))
    rule = FedAvg(lr=0.3, steps=1)
    fix, avg = watch(federation, fedfix(window=tau), rule, 12), watch(federation, synchronous(cohort=4), rule, 12)
    assert all(len(cohort) == 4 for cohort in fix.cohorts)
    assert same(fix.models, avg.models)


def test_a_job_of_two_windows_takes_two_of_them():
    """Two thirds of a second are rounded up to nanoseconds, one third is rounded down."""
    seen = watch(bowls(job=2 / 3), fedfix(window=1 / 3), rounds=12)
    assert [len(cohort) for cohort in seen.cohorts] == [0, 10] * 6


@pytest.mark.parametrize("dt", [0.2, 0.5, 0.8, 1.0])
def test_every_client_delivers_once_in_its_number_of_windows_and_counts_by_its_importance(dt):
    """Over a common multiple of all periods: exactly multiple / ceil(tau_i / dt) deliveries, and p_i a window on average."""
    periods = [windows(tau, dt) for tau in TAU]
    multiple = math.lcm(*periods)
    seen = watch(bowls(), fedfix(window=dt), rounds=multiple)
    deliveries, counted = seen.counted()
    assert deliveries.tolist() == [multiple / k for k in periods]
    torch.testing.assert_close(counted / multiple, torch.full((10,), 0.1, dtype=torch.float64), rtol=0, atol=1e-12)
    assert seen.seconds[-1] == pytest.approx(multiple * dt, abs=1e-9)


def test_importance_is_that_of_the_rule():
    """Clients with more samples count more, by as much as in FedAvg."""
    federation = hs.Federation(hs.tasks.digits(hidden=1), 5, hs.dirichlet(0.3), fleet(), dtype="float64")
    samples = federation.split.train.counts().double()
    _, counted = watch(federation, fedfix(window=0.5), rounds=2).counted()
    torch.testing.assert_close(counted / 2, samples / samples.sum(), rtol=0, atol=1e-12)


def test_plain_weights_count_fast_clients_more():
    deliveries, counted = watch(bowls(), fedfix(window=0.5, weights="plain"), rounds=20).counted()
    torch.testing.assert_close(counted, deliveries / 10, rtol=0, atol=1e-12)
    assert deliveries.tolist() == [20 / windows(tau, 0.5) for tau in TAU] and set(deliveries.tolist()) == {10, 20}


@pytest.mark.parametrize("dt", [0.2, 0.5])
def test_it_follows_the_scheme_of_the_paper(dt):
    """x <- x + sum_i p_i ceil(tau_i / dt) Delta_i, each from the model that its client was sent, written as a loop over windows."""
    federation = bowls()
    a, b = federation.task.samples().unbind(1)
    models = [federation.problem.start]
    for n in range(1, 13):
        x = models[-1].clone()
        for i, tau in enumerate(TAU):
            k = windows(tau, dt)
            if n % k == 0:
                start = models[n - k]
                x += k / 10 * ((1 - 0.1 * a[i]) ** 3 - 1) * (start - b[i])
        models.append(x)
    seen = watch(federation, fedfix(window=dt), FedAvg(lr=0.1, steps=3), 12)
    torch.testing.assert_close(torch.stack(seen.models), torch.stack(models[1:]), rtol=0, atol=1e-12)


def test_a_window_in_which_nobody_delivers_leaves_the_model_alone():
    seen = watch(bowls(job="1"), fedfix(window=0.4), FedAvg(lr=0.1, steps=1), 6)
    assert [len(cohort) for cohort in seen.cohorts] == [0, 0, 10, 0, 0, 10]
    moved = [not torch.equal(x, y) for x, y in zip([seen.net.problem.start, *seen.models], seen.models, strict=False)]
    assert moved == [False, False, True, False, False, True]
    assert seen.seconds == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.4])


@pytest.mark.parametrize("schedule", [fedfix(window=0.5), hs.schedules.fedbuff(buffer=3), hs.schedules.fedasync()], ids=str)
def test_a_delivered_job_costs_the_bytes_of_fedavg(schedule):
    """A model each way, about 8 bytes a number."""
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, fleet=fleet(), dtype="float64")
    avg, seen = watch(federation, synchronous(cohort=6), FedAvg(steps=1), 2), watch(federation, schedule, FedAvg(steps=1), 9)
    jobs = avg.records[-1]["updates"]
    down, up = avg.records[-1]["bytes_down"] / jobs, avg.records[-1]["bytes_up"] / jobs
    clock = seen.net.clock
    assert clock.down == down * clock.tickets
    assert clock.up == up * (seen.records[-1]["updates"] + len(clock.arrived))
    size = 8 * federation.problem.shared
    assert size < down < size + 200 and size < up < size + 400


def test_few_at_work():
    """Three of ten at a time, drawn anew among those that are free."""
    seen = watch(bowls(), fedfix(window=0.5, cohort=3), rounds=30)
    assert all(len(cohort) <= 3 for cohort in seen.cohorts) and {c for cohort in seen.cohorts for c in cohort} == set(range(10))
    assert seen.net.clock.tickets == seen.records[-1]["updates"] + len(seen.net.out)


def test_jobs_without_a_reply_are_given_up_and_the_client_starts_again():
    """Half of the replies get lost; a client without one is free after 1.5 seconds, which is the end of the second window."""
    seen = watch(bowls(loss=0.5, job="0.9"), fedfix(window=1.0, patience=1.5), rounds=30)
    jobs, lost, used = seen.net.clock.tickets, seen.net.clock.lost, seen.records[-1]["updates"]
    assert 0.35 < lost / jobs < 0.65 and 0 <= jobs - lost - used <= 10
    assert sum(done(seen)) == used
    assert 2 * lost + used == pytest.approx(30 * 10, abs=10)


def test_somebody_who_comes_back_starts_at_the_next_window():
    """There from 0 to 1 and from 3 to 4 seconds and so on, each client with an offset: work stands still meanwhile."""
    seen = watch(bowls(job="0.5", trace="cyclic(rate=0.34, period=3, slot=1)"), fedfix(window=0.5), rounds=24)
    deliveries, _ = seen.counted()
    assert deliveries.tolist() == [8] * 10
    assert {len(cohort) for cohort in seen.cohorts} < set(range(10))


def test_f80_is_what_the_paper_says():
    job = hs.fleet.Distribution.parse(F80).draw(bowls().population, torch.arange(10), "job")
    torch.testing.assert_close(job, torch.tensor(TAU, dtype=torch.float64), rtol=0, atol=1e-12)
