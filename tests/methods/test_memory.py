"""MIFA and FedVARP against their formulas, with all last updates held in one place."""

from __future__ import annotations

import pytest
import torch

import hanse as hs
from hanse.methods import MIFA, FedAvg, FedVARP

ENGINE = hs.engines.local(path="stacked", chunk=6, workers=1, threads=1)


@pytest.mark.parametrize("rule", [MIFA, FedVARP])
def test_every_round_is_the_algorithm_written_out(quadratics, bowls, follow, rule):
    """Three of ten clients, two full-batch steps, the papers' form: the server holds all y."""
    x, y = torch.zeros_like(bowls.best), torch.zeros_like(bowls.b)
    for seen in follow(quadratics, rule(lr=0.1, steps=2, server_lr=0.7), 15, cohort=3):
        cohort = seen.record["cohort"]
        w = x.expand(10, -1)
        for _ in range(2):
            w = w - 0.1 * bowls.grad(w)
        new = y.clone()
        new[cohort] = (w - x)[cohort]
        x = x + 0.7 * (new.mean(0) if rule is MIFA else (new - y)[cohort].mean(0) + y.mean(0))
        y = new
        torch.testing.assert_close(seen.x, x, rtol=0, atol=1e-12)
        torch.testing.assert_close(seen.kept["y"], y, rtol=0, atol=1e-12)
        torch.testing.assert_close(seen.state["y"], y.mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", ["uniform", "samples"])
@pytest.mark.parametrize("rule", [MIFA, FedVARP])
def test_with_everyone_there_they_are_fedavg(digits, follow, rule, target):
    ends = [follow(digits, r(lr=0.3, weights=target), 4)[-1].x for r in (rule, FedAvg)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [MIFA, FedVARP])
def test_the_server_holds_the_weighted_mean_of_all_last_updates(digits, follow, rule):
    n = digits.split.train.counts().double()
    for seen in follow(digits, rule(lr=0.3, weights="samples"), 5, cohort=2):
        torch.testing.assert_close(seen.state["y"], n @ seen.kept["y"] / n.sum(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [MIFA, FedVARP])
def test_with_one_step_they_reach_the_optimum_though_some_are_there_more_often(bowls, follow, rule):
    """FedAvg of the participants stops far away, at the minimiser of an objective in which the frequent count more."""
    fleet = hs.fleet.ideal(trace=hs.fleet.bernoulli(hs.fleet.evenly(0.3, 1)))
    federation = hs.Federation(hs.tasks.quadratics(), clients=10, partition=hs.natural(), fleet=fleet, dtype="float64")
    ends = [follow(federation, r(lr=0.15, steps=1, weights="uniform"), 100)[-1].x for r in (rule, FedAvg)]
    assert bowls.distance(ends[0]) < 1e-3
    assert bowls.distance(ends[1]) > 0.3


def test_fedvarp_takes_new_changes_in_full_and_mifa_one_nth(quadratics, follow):
    """In the first round nothing is remembered: FedVARP is FedAvg, MIFA moves 3/10 as far."""
    start = quadratics.problem.start
    mifa, varp, plain = (
        follow(quadratics, r(lr=0.1, steps=2, weights="uniform"), 1, cohort=3)[0].x - start for r in (MIFA, FedVARP, FedAvg)
    )
    torch.testing.assert_close(varp, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(mifa, 0.3 * plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [MIFA, FedVARP])
def test_books_balance_whatever_the_schedule_discounts(rule):
    """Late updates move the model less, but the server's mean stays the mean of what clients keep."""
    fleet = hs.fleet.devices(step="evenly(0.1, 0.4)", loss=0.1)
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, fleet=fleet, dtype="float64")
    seen = []
    hs.run(
        federation,
        rule(steps=2),
        hs.schedules.fedbuff(buffer=2, patience=5),
        rounds=20,
        evaluate=0,
        engine=ENGINE,
        on_start=seen.append,
    )
    kept = seen[0].kept.read(torch.arange(6))["y"]
    torch.testing.assert_close(seen[0].state["y"], kept.mean(0), rtol=0, atol=1e-12)


def test_they_send_no_more_than_one_vector():
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6)
    costs = []
    for rule in (MIFA(), FedVARP(), FedAvg()):
        last = hs.run(federation, rule, hs.schedules.synchronous(4), rounds=3, evaluate=0, engine=ENGINE).history[-1]
        costs.append((last["bytes_down"], last["bytes_up"]))
    assert costs[0] == costs[1] and costs[0][0] == costs[2][0]
    assert abs(costs[0][1] - costs[2][1]) <= 12 * 8  # the tensor is called change instead of delta
