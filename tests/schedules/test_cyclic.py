"""Turns in a fixed order."""

from __future__ import annotations

import pytest
import torch
from small_runs import bowls, done, watch

import hanse as hs
from hanse.methods import FedAvg
from hanse.schedules import cyclic, synchronous


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("cohort", [1, 3, 5, 10])
def test_everyone_once_in_a_cycle(cohort, shuffle):
    """The last cohort of a cycle has those who are left."""
    turns = -(-10 // cohort)
    seen = watch(bowls(), cyclic(cohort=cohort, shuffle=shuffle), rounds=3 * turns)
    for cycle in range(3):
        cohorts = seen.cohorts[cycle * turns : (cycle + 1) * turns]
        assert sorted(c for cohort in cohorts for c in cohort) == list(range(10))
        assert [len(c) for c in cohorts] == [cohort] * (10 // cohort) + [10 % cohort] * (10 % cohort > 0)
    assert done(seen) == [3] * 10


def test_the_order_is_the_clients_own_or_a_new_one_in_every_cycle():
    plain, shuffled = (watch(bowls(), cyclic(cohort=2, shuffle=s), rounds=20).cohorts for s in (False, True))
    assert plain == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]] * 4
    cycles = [str(shuffled[t : t + 5]) for t in range(0, 20, 5)]
    assert len(set(cycles)) == 4 and str(plain[:5]) not in cycles
    assert shuffled == watch(bowls(), cyclic(cohort=2, shuffle=True), rounds=20).cohorts, "the same seed, the same order"


def test_a_cohort_of_everyone_makes_it_fedavg_bit_for_bit():
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, partition=hs.dirichlet(0.5))
    one, other = (watch(federation, s, FedAvg(lr=0.3), 3).models for s in (cyclic(cohort=6), synchronous(cohort=6)))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_who_is_away_misses_the_turn():
    """Presence by rounds: of a turn's cohort those who are there, and a turn of nobody passes."""
    federation = hs.Federation(hs.tasks.quadratics(), 10, hs.natural(), hs.fleet.ideal(trace="bernoulli(0.5)"), dtype="float64")
    seen = watch(federation, cyclic(cohort=2), rounds=40)
    trace = federation.fleet.trace
    for t, cohort in enumerate(seen.cohorts):
        turn = torch.tensor([2 * (t % 5), 2 * (t % 5) + 1])
        assert cohort == turn[trace.online(federation.population, turn, 0.0, t)].tolist()
    assert [] in seen.cohorts


def test_when_everybody_is_away_the_turn_waits_for_somebody_to_come_back():
    """Two clients that are there for a second in every ten: no more than ten rounds pass in a second without anyone."""
    seen = watch(bowls(clients=2, job="0.5", trace="cyclic(rate=0.1, period=10, slot=1)"), cyclic(cohort=1), rounds=20)
    assert seen.seconds[-1] > 20 and sum(map(len, seen.cohorts)) > 5


def test_more_than_there_are_is_refused():
    with pytest.raises(hs.ConfigError, match=r"cyclic.cohort: 11 is not allowed: at most the number of clients, 10"):
        watch(bowls(), cyclic(cohort=11), rounds=1)
