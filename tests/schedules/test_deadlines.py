"""Rounds that go on without everybody: over-selection, deadlines, clients that are away, and replies that get lost."""

from __future__ import annotations

import math

import pytest
import torch
from small_runs import bowls, done, watch

import hanse as hs
from hanse.methods import FedAvg, Scaffold
from hanse.schedules import synchronous

TAU = [1.0 - 0.8 * i / 9 for i in range(10)]
"""Seconds of a job of each of ten clients."""


def test_over_selection_takes_exactly_the_first_ones_to_arrive():
    """Ten are asked, the five fastest are taken, and the others stop: they send nothing and remember nothing."""
    seen = watch(bowls(), synchronous(cohort=5, over=1.0), rounds=3)
    assert seen.cohorts == [[5, 6, 7, 8, 9]] * 3
    assert seen.seconds == pytest.approx([n * TAU[5] for n in (1, 2, 3)])
    assert done(seen) == [0] * 5 + [3] * 5
    clock, record = seen.net.clock, seen.records[-1]
    assert clock.tickets == 30 and record["updates"] == 15 and clock.lost == clock.late == 0
    assert record["bytes_up"] / 15 == watch(bowls(), synchronous(cohort=10), rounds=1).records[-1]["bytes_up"] / 10


@pytest.mark.parametrize(
    ("cohort", "over", "asked"), [(5, 0.0, 5), (5, 0.1, 6), (5, 0.2, 6), (5, 0.25, 7), (10, 0.1, 11), (5, 9.0, 12)]
)
def test_so_many_more_are_asked(cohort, over, asked):
    """cohort (1 + over), rounded up but for what the product is rounded by, and at most everybody, who are twelve."""
    seen = watch(bowls(clients=12), synchronous(cohort=cohort, over=over), rounds=2)
    assert seen.net.clock.tickets == 2 * asked and seen.records[-1]["updates"] == 2 * cohort


def test_of_replies_in_the_same_instant_the_first_clients_are_taken():
    seen = watch(bowls(job="1"), synchronous(cohort=4, over=1.5), rounds=2)
    assert seen.cohorts == [[0, 1, 2, 3]] * 2 and done(seen) == [2] * 4 + [0] * 6


def test_over_selection_makes_up_for_lost_replies():
    """Half of the replies get lost. Of nine who are asked the first three of those that come are taken, where so many do."""
    plain, more = (watch(bowls(loss=0.5), synchronous(cohort=3, over=over), rounds=30) for over in (0.0, 2.0))
    sizes = [[len(cohort) for cohort in seen.cohorts] for seen in (plain, more)]
    assert sum(sizes[0]) / 30 == pytest.approx(1.5, abs=0.7) and sum(sizes[1]) / 30 > 2.6
    assert max(sizes[0]) <= 3 and max(sizes[1]) == 3


def test_a_round_ends_at_its_deadline_with_the_replies_there_are():
    seen = watch(bowls(), synchronous(cohort=10, deadline=0.5), rounds=3)
    assert seen.cohorts == [[i for i in range(10) if TAU[i] <= 0.5]] * 3
    assert seen.seconds == pytest.approx([0.5, 1.0, 1.5])
    assert done(seen) == [3 * (tau <= 0.5) for tau in TAU]


def test_a_reply_at_the_deadline_is_in_time():
    seen = watch(bowls(), synchronous(cohort=10, deadline=0.2), rounds=2)
    assert seen.cohorts == [[9]] * 2


def test_a_deadline_nobody_needs_changes_nothing():
    federation = hs.Federation(hs.tasks.digits(hidden=8), 6, hs.dirichlet(0.5), hs.fleet.devices(job="evenly(1.0, 0.2)"))
    plain, late = (watch(federation, synchronous(cohort=6, deadline=d), FedAvg(lr=0.3), 3) for d in (None, 5.0))
    assert all(torch.equal(a, b) for a, b in zip(plain.models, late.models, strict=True))
    assert plain.seconds == late.seconds


def test_a_deadline_before_anybody_leaves_the_model_alone():
    seen = watch(bowls(), synchronous(cohort=10, deadline=0.1), rounds=3)
    assert seen.cohorts == [[]] * 3 and seen.seconds == pytest.approx([0.1, 0.2, 0.3])
    assert torch.equal(seen.models[-1], seen.net.problem.start)


@pytest.mark.parametrize(("least", "moves"), [(0, True), (4, True), (5, False)])
def test_with_too_few_replies_neither_the_model_nor_the_clients_change(least, moves):
    """Four reply by half a second."""
    seen = watch(bowls(), synchronous(cohort=10, deadline=0.5, least=least), Scaffold(lr=0.1, steps=2), rounds=2)
    kept = seen.net.kept.read(torch.arange(10))["c"].any(1)
    assert kept.tolist() == [moves and tau <= 0.5 for tau in TAU]
    assert torch.equal(seen.models[-1], seen.net.problem.start) == (not moves)
    assert seen.records[-1]["updates"] == 8 * moves and len(seen.net.arrived) == len(seen.net.out) == 0
    assert seen.records[-1]["bytes_up"] > 0, "what was thrown away has been sent"


def test_more_than_the_cohort_cannot_be_the_least():
    with pytest.raises(hs.ConfigError, match=r"synchronous.least: 6 is not allowed: at most the cohort, 5"):
        synchronous(cohort=5, least=6)


def test_a_job_whose_reply_gets_lost_is_given_up_when_nothing_more_can_come():
    seen = watch(bowls(loss=0.5), synchronous(cohort=10), rounds=6)
    assert {len(cohort) for cohort in seen.cohorts} < set(range(1, 10))
    for n, (cohort, end) in enumerate(zip(seen.cohorts, seen.seconds, strict=True)):
        began = seen.seconds[n - 1] if n else 0.0
        assert end - began == pytest.approx(max(TAU[i] for i in cohort))
    assert done(seen) == [sum(i in cohort for cohort in seen.cohorts) for i in range(10)]


# ---- clients that are away


def test_presence_by_rounds():
    """Everybody who is there of those there in this round, drawn by the trace; a round with nobody passes."""
    federation = hs.Federation(hs.tasks.quadratics(), 10, hs.natural(), hs.fleet.ideal(trace="bernoulli(0.2)"), dtype="float64")
    seen = watch(federation, synchronous(cohort=10), rounds=40)
    trace, everyone = federation.fleet.trace, torch.arange(10)
    there = [everyone[trace.online(federation.population, everyone, 0.0, t)].tolist() for t in range(40)]
    assert seen.cohorts == there
    assert [] in there and max(map(len, there)) > 3


def test_a_cohort_is_drawn_from_those_who_are_there():
    federation = hs.Federation(hs.tasks.quadratics(), 10, hs.natural(), hs.fleet.ideal(trace="bernoulli(0.5)"), dtype="float64")
    seen = watch(federation, synchronous(cohort=3), rounds=30)
    trace, everyone = federation.fleet.trace, torch.arange(10)
    for t, cohort in enumerate(seen.cohorts):
        there = everyone[trace.online(federation.population, everyone, 0.0, t)].tolist()
        assert set(cohort) <= set(there) and len(cohort) == min(3, len(there))


@pytest.mark.parametrize("schedule", [synchronous(cohort=10), synchronous(cohort=10, over=0.1), synchronous(10, draw="bernoulli")])
def test_when_everybody_is_away_the_round_waits_for_somebody_to_come_back(schedule):
    """One client, there for a second in every ten; a job takes all of that second."""
    federation = bowls(clients=10, job="0.5", trace="cyclic(rate=0.1, period=10, slot=1)")
    seen = watch(federation, schedule, rounds=12)
    away = federation.fleet.trace.away(federation.population, torch.arange(10), 1000.0)
    for cohort, end in zip(seen.cohorts, seen.seconds, strict=True):
        assert cohort, "nobody was asked, but there was somebody to wait for"
        for i in cohort:
            assert not any(who == i and begin < end - 0.25 < until for who, begin, until in away.tolist())
    assert seen.seconds[-1] > 6


def test_everybody_away_for_ever_ends_the_run():
    """Everyone crashes within seconds and never comes back: the rounds that are left pass with nobody in them."""
    seen = watch(bowls(trace="crashes(every=1, lasts=inf, slot=0.5)"), synchronous(cohort=10), rounds=60)
    assert seen.net.round == 60 and seen.cohorts[-1] == [] and math.isfinite(seen.seconds[-1])
    last = max(t for t, cohort in enumerate(seen.cohorts) if cohort)
    assert all(torch.equal(x, seen.models[last]) for x in seen.models[last:])


def test_work_that_a_crash_destroys_leaves_the_client_as_it_was():
    seen = watch(bowls(job="1", trace="crashes(every=2, lasts=1, slot=0.25)"), synchronous(cohort=10), rounds=20)
    assert done(seen) == [sum(i in cohort for cohort in seen.cohorts) for i in range(10)]
    assert seen.net.clock.lost > 10


def test_a_bernoulli_draw_of_nobody_is_an_empty_round():
    """Drawn each with probability a tenth of all who are there; nobody drawn is not nobody there."""
    seen = watch(bowls(), synchronous(cohort=1, draw="bernoulli"), rounds=60)
    sizes = [len(cohort) for cohort in seen.cohorts]
    assert 10 < sizes.count(0) < 35 and max(sizes) > 1
    for t in (t for t in range(1, 60) if not sizes[t]):
        assert seen.seconds[t] == seen.seconds[t - 1] and torch.equal(seen.models[t], seen.models[t - 1])
