"""FedAU and its baselines: the weights against the paper's counters, and what they do to the model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hanse as hs
from hanse.core.streams import Streams
from hanse.fleet import bernoulli, by_labels, cyclic, devices, evenly, ideal, listed, markov
from hanse.fleet.distributions import CHANCE
from hanse.methods import AverageAll, FedAU, FedAvg, KnownParticipation
from hanse.methods.fedau import mean_gap

ENGINE = hs.engines.local(path="stacked", chunk=6, workers=1, threads=1)


def quadratics(fleet: hs.fleet.Fleet) -> hs.Federation:
    """Ten clients, each with one quadratic of its own."""
    return hs.Federation(hs.tasks.quadratics(), clients=10, partition=hs.natural(), fleet=fleet, dtype="float64")


# ---- the weights


def update_weight(presence: list[bool], cutoff: float) -> list[float]:
    """The paper's box, round by round: the weight that is used in each round."""
    gaps, open_gap, omega, used = 0, 0, 1.0, []
    for there in presence:
        used.append(omega)
        open_gap += 1
        if there or open_gap == cutoff:
            omega = open_gap if gaps == 0 else (gaps * omega + open_gap) / (gaps + 1)
            gaps, open_gap = gaps + 1, 0
    return used


def weights(presence: list[bool], cutoff: int | None) -> list[float]:
    """The same weights, from the counters that only change when the client is there; one for each participation."""
    gaps = rounds = torch.zeros(1)
    used = []
    for now in (t for t, there in enumerate(presence) if there):
        omega, gaps, rounds = mean_gap(gaps, rounds, torch.tensor([float(now)]), cutoff)
        used.append(float(omega))
    return used


@given(st.lists(st.booleans(), max_size=60), st.none() | st.integers(1, 12))
def test_the_weights_are_those_of_the_papers_counters(presence, cutoff):
    expected = [w for w, there in zip(update_weight(presence, cutoff or math.inf), presence, strict=True) if there]
    assert weights(presence, cutoff) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("period", [1, 2, 7, 50])
def test_a_client_that_comes_every_so_many_rounds_counts_by_them(period):
    presence = [(t + 1) % period == 0 for t in range(5 * period)]
    for cutoff in (None, period, 60):
        assert weights(presence, cutoff) == [1, period, period, period, period]


@pytest.mark.parametrize(("period", "cutoff"), [(7, 3), (9, 3), (10, 4)])
def test_longer_gaps_count_as_pieces(period, cutoff):
    """P = q K + r makes pieces K, ..., K, r, whose mean is P over their number."""
    pieces = -(-period // cutoff)
    gaps = rounds = torch.zeros(1)
    for times in range(1, 5):
        _, gaps, rounds = mean_gap(gaps, rounds, torch.tensor([times * period - 1.0]), cutoff)
        assert float(rounds / gaps) == pytest.approx(period / pieces)


def test_the_weights_tend_to_their_expectation():
    """2000 participations of 128 clients, for p = 0.05 some 40000 rounds: (1 - (1 - p)^K) / p, for the paper's p and K."""
    p = torch.tensor([[0.05], [0.3]], dtype=torch.float64).repeat_interleave(64, 0)
    u = Streams(0).uniform("gaps", torch.arange(128), n=2000)
    times = (torch.log(u) / torch.log1p(-p)).ceil().cumsum(1) - 1
    for cutoff, expected in {5: (4.52, 2.773), 50: (18.46, 3.333), None: (20.0, 3.333)}.items():
        gaps = rounds = torch.zeros(128)
        for now in times.float().unbind(1):
            omega, gaps, rounds = mean_gap(gaps, rounds, now, cutoff)
        assert omega.view(2, 64).mean(1).tolist() == pytest.approx(expected, rel=0.02)


# ---- what they do to the model


def test_with_everyone_there_it_is_average_all(digits, follow):
    """Bit for bit: every gap is one round, and the factors are exactly 1."""
    ours, plain = (follow(digits, rule, 5) for rule in (FedAU(lr=0.3, steps=2, cutoff=3), AverageAll(lr=0.3, steps=2)))
    assert all(torch.equal(a.x, b.x) for a, b in zip(ours, plain, strict=True))
    known = follow(digits, KnownParticipation(lr=0.3, steps=2, rate=1), 5)
    assert torch.equal(known[-1].x, plain[-1].x)


@pytest.mark.parametrize("target", ["uniform", "samples"])
def test_with_everyone_there_average_all_is_fedavg(digits, follow, target):
    ends = [follow(digits, rule, 3)[-1].x for rule in (AverageAll(steps=2, weights=target), FedAvg(steps=2, weights=target))]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [FedAU(lr=0.05, steps=1), FedAU(lr=0.05, steps=1, cutoff=4), FedAU(lr=0.05, steps=1, cap=3.5)])
def test_every_round_is_the_algorithm_written_out(bowls, follow, rule):
    """x <- x + (1/N) sum omega_n Delta_n over those who are there, with the paper's counters of all clients."""
    federation = quadratics(ideal(trace=bernoulli(evenly(0.05, 0.5))))
    x, presence, empty = torch.zeros_like(bowls.best), [[] for _ in range(10)], 0
    for seen in follow(federation, rule, 60):
        cohort = seen.record["cohort"]
        for i, rounds in enumerate(presence):
            rounds.append(i in cohort)
        omega = Tensor([min(update_weight(presence[i], rule.cutoff or math.inf)[-1], rule.cap or math.inf) for i in cohort])
        x = x - 0.05 / 10 * omega.double() @ (bowls.a * (x - bowls.b))[cohort]
        torch.testing.assert_close(seen.x, x, rtol=1e-6, atol=1e-7)
        empty += not cohort
    assert empty  # a round without anyone leaves the model alone, but its length counts


def test_the_cap_is_reported_where_it_holds_somebody_back(follow):
    rates = listed((0.1, *[1.0] * 9))
    last = follow(quadratics(ideal(trace=bernoulli(rates))), FedAU(cap=4, steps=1), 40)[-1]
    capped = last.kept["capped"][:, 0]
    assert capped[0] > 0 and not capped[1:].any()


@pytest.mark.parametrize("target", ["uniform", "samples"])
def test_average_all_divides_by_everybody(digits, follow, target):
    """In the first round it moves along FedAvg's step, less by the participants' share of the weight of all clients."""
    one, other = (follow(digits, rule(lr=0.3, weights=target), 1, cohort=2)[0] for rule in (AverageAll, FedAvg))
    counts = digits.split.train.counts().double() if target == "samples" else torch.ones(6, dtype=torch.float64)
    share = counts[one.record["cohort"]].sum() / counts.sum()
    start = digits.problem.start
    torch.testing.assert_close(one.x - start, share * (other.x - start), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", [bernoulli, markov, cyclic])
def test_known_rates_are_those_of_the_fleet(digits, pattern):
    """Also when they are drawn, and whatever the seed of the run."""
    trace = pattern(by_labels())
    p = CHANCE.draw(trace.rate, digits.population, torch.arange(6), f"trace.{pattern.__name__}.rate")
    rule = KnownParticipation(pattern=pattern.__name__)
    assert torch.equal(rule.kept(digits.problem, digits.population)["p"][:, 0], p)


def test_known_participation_counts_by_one_over_p(bowls, follow):
    rates = evenly(0.2, 0.9)
    federation = quadratics(ideal(trace=bernoulli(rates)))
    x, p = torch.zeros_like(bowls.best), torch.linspace(0.2, 0.9, 10, dtype=torch.float64)
    for seen in follow(federation, KnownParticipation(lr=0.05, steps=1, rate=rates), 20):
        cohort = seen.record["cohort"]
        x = x - 0.05 / 10 * (1 / p[cohort]) @ (bowls.a * (x - bowls.b))[cohort]
        torch.testing.assert_close(seen.x, x, rtol=0, atol=1e-12)


def test_a_lost_reply_counts_as_absence(follow):
    """Everybody is asked in every round; who is not in the cohort got lost, and the counters only know of the others."""
    fleet = devices(loss=0.4)
    rounds = follow(quadratics(fleet), FedAU(steps=1), 20)
    cohorts = [seen.record["cohort"] for seen in rounds]
    times = torch.bincount(torch.tensor([i for cohort in cohorts for i in cohort]), minlength=10)
    last = torch.tensor([max(t for t, cohort in enumerate(cohorts) if i in cohort) for i in range(10)])
    assert times.sum() < 150
    assert torch.equal(rounds[-1].kept["gaps"][:, 0], times.double())
    assert torch.equal(rounds[-1].kept["rounds"][:, 0], last.double() + 1)


# ---- how it runs


def test_it_sends_as_much_as_fedavg_and_keeps_two_numbers_a_client():
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, fleet=ideal(trace=bernoulli(0.5)))
    costs = []
    for rule in (FedAU(), AverageAll(), KnownParticipation(), FedAvg()):
        run = hs.run(federation, rule, hs.schedules.synchronous(6), rounds=5, evaluate=0, engine=ENGINE)
        costs.append((run.history[-1]["bytes_down"], run.history[-1]["bytes_up"]))
        if isinstance(rule, FedAU):
            kept = {n: t.shape for n, t in run.state.items() if n.startswith("kept.") and n != "kept.owners"}
    assert len(set(costs)) == 1
    assert kept == {"kept.gaps": (6, 1), "kept.rounds": (6, 1)}


@pytest.mark.parametrize("how", [{"path": "loop", "chunk": 1}, {"shortcuts": True}])
def test_batched_equals_one_client_at_a_time_and_the_shortcuts(follow, how):
    fleet = ideal(trace=bernoulli(evenly(0.2, 0.9)))
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, partition=hs.dirichlet(0.5), fleet=fleet, dtype="float64")
    rule = FedAU(lr=0.1, batch=16, weights="samples")
    torch.testing.assert_close(follow(federation, rule, 8)[-1].x, follow(federation, rule, 8, **how)[-1].x, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "schedule", ["fedbuff(buffer=2)", "fedbuff(buffer=2, weights='unbiased')", "fedfix(window=2)", "cyclic(cohort=3)"]
)
def test_it_runs_under_any_schedule(schedule):
    """Versions are the rounds then; no client counts less than one that is always there."""
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, fleet=devices(step="evenly(0.1, 0.4)"))
    rule = FedAU(steps=2, cutoff=5)
    run = hs.run(federation, rule, hs.schedules.Schedule.parse(schedule), rounds=20, evaluate=0, engine=ENGINE)
    gaps, rounds = run.state["kept.gaps"], run.state["kept.rounds"]
    assert len(gaps) == 6 and bool((rounds >= gaps).all() and (gaps > 0).all())
    assert all(bool(torch.isfinite(w).all()) for w in run.weights.values())


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [(FedAU, {"cutoff": 0}), (FedAU, {"cap": 0.5}), (KnownParticipation, {"rate": 0}), (KnownParticipation, {"rate": 1.5})],
)
def test_impossible_settings_are_refused(rule, wrong):
    with pytest.raises(hs.ConfigError, match=rf"{rule.__name__}.{next(iter(wrong))}.* is not allowed"):
        rule(**wrong)


def test_a_rate_of_zero_is_refused_when_it_is_drawn():
    federation = quadratics(ideal())
    with pytest.raises(hs.ConfigError, match=r"for client 0, is not allowed: it has to be a probability above 0"):
        hs.run(federation, KnownParticipation(rate=evenly(0, 1)), rounds=1)
