"""FedAsync, which mixes models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import bowls, watch

import hanse as hs
from hanse.core.messages import Reply
from hanse.methods import FedAsync, FedAvg, FedProx
from hanse.schedules import fedasync, fedbuff
from hanse.schedules.staleness import constant, polynomial

TAU = [round((1.0 - 0.8 * i / 9) * 1e9) for i in range(10)]
"""Nanoseconds of a job of each of ten clients."""


def reply(models, weight, scale):
    """What the server sees of clients that end at ``models`` ``[C, P]``."""
    clients = torch.arange(len(weight))
    sums, scaled = ({"model": w @ models} for w in (weight, weight * scale))
    return Reply(clients, clients * 0, weight, sums, {}, {}, weight * 0, len(weight), {}, scaled, scale)


@given(alpha=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_one_reply_mixes_two_models(quadratics, alpha, seed):
    """x <- (1 - alpha_n) x + alpha_n x_i, whatever the client's number of samples."""
    x, model = torch.randn(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weight, scale = torch.tensor([37.0], dtype=torch.float64), torch.tensor([alpha], dtype=torch.float64)
    before = x.clone()
    after = FedAsync().step({"x": x}, reply(model[None], weight, scale), 0)["x"]
    torch.testing.assert_close(after, (1 - alpha) * x + alpha * model, rtol=0, atol=1e-13)
    assert torch.equal(x, before), "the server's state is never changed in place"


def test_several_replies_pull_each_by_its_share():
    """x <- x + sum_i omega_i (x_i - x) with omega_i = s_i w_i / sum_j w_j."""
    generator = torch.Generator().manual_seed(0)
    x, models = torch.randn(5, generator=generator).double(), torch.randn(3, 5, generator=generator).double()
    weight, scale = torch.tensor([1.0, 2.0, 5.0]).double(), torch.tensor([1.0, 0.5, 0.25]).double()
    omega = weight * scale / 8
    expected = x + omega @ (models - x)
    torch.testing.assert_close(FedAsync().step({"x": x}, reply(models, weight, scale), 0)["x"], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("mu", [0, 0.5])
def test_with_a_barrier_it_is_fedprox(digits, follow, mu):
    """All start from x and count in full, so that the models' mean is x plus the mean displacement."""
    how = {"lr": 0.3, "epochs": 2, "batch": 16}
    ours, prox = follow(digits, FedAsync(mu=mu, **how), 3), follow(digits, FedProx(mu=mu, **how), 3)
    for a, b in zip(ours, prox, strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-12)
        assert a.record["bytes_down"] == b.record["bytes_down"]
        sent = a.record["bytes_up"] - b.record["bytes_up"]
        assert abs(sent) < 16 * a.record["updates"], "as many numbers, under another name"
    if not mu:
        torch.testing.assert_close(ours[-1].x, follow(digits, FedAvg(**how), 3)[-1].x, rtol=0, atol=1e-12)


def test_a_batch_of_clients_equals_one_client_at_a_time(digits, follow):
    rule = FedAsync(lr=0.3, mu=0.1, batch=16)
    reference = follow(digits, rule, 2, cohort=4)[-1].x
    for how in ({"chunk": 1}, {"chunk": 2}, {"chunk": 1, "path": "loop"}):
        torch.testing.assert_close(follow(digits, rule, 2, cohort=4, **how)[-1].x, reference, rtol=0, atol=1e-10)


def models_of(rule, schedule, rounds):
    federation = bowls()
    return federation, torch.stack(watch(federation, schedule, rule, rounds).models)


@pytest.mark.parametrize("mu", [0, 0.7])
def test_it_follows_algorithm_1_of_the_paper(mu):
    """Written as a loop over arrivals: three steps of rate 0.1 on f_i + (mu / 2) |w - x_rho|^2, alpha 0.6, s(u) = (1 + u)^-0.5."""
    federation, found = models_of(FedAsync(lr=0.1, steps=3, mu=mu), fedasync(), 50)
    curve, centre = federation.task.samples().unbind(1)
    x, models = federation.problem.start, []
    jobs = {i: (tau, 0, x) for i, tau in enumerate(TAU)}
    while len(models) < 50:
        now = min(arrives for arrives, _, _ in jobs.values())
        free = [i for i in jobs if jobs[i][0] == now]
        for i in free:
            _, rho, start = jobs[i]
            w = start
            for _ in range(3):
                w = w - 0.1 * (curve[i] * (w - centre[i]) + mu * (w - start))
            alpha = 0.6 * (1 + len(models) - rho) ** -0.5
            x = (1 - alpha) * x + alpha * w
            models.append(x)
        jobs |= {i: (now + TAU[i], len(models), x) for i in free}
    torch.testing.assert_close(found, torch.stack(models[:50]), rtol=0, atol=1e-12)


def test_moving_towards_a_model_is_not_moving_along_its_displacement():
    """The same schedule with FedAvg: the difference is what others did since the client started, so there is none at first."""
    schedule = fedasync(alpha=0.5, staleness=constant())
    (_, towards), (_, along) = (models_of(rule(lr=0.1, steps=3), schedule, 12) for rule in (FedAsync, FedAvg))
    torch.testing.assert_close(towards[0], along[0], rtol=0, atol=1e-12)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(towards[1:], along[1:], strict=True))


def test_what_is_too_old_pulls_nothing():
    """With ten at work only the very first reply is of the newest model; no later one may move it."""
    federation, found = models_of(FedAsync(lr=0.1, steps=3), fedbuff(buffer=1, staleness=polynomial(0), oldest=0), 20)
    assert not torch.allclose(found[0], federation.problem.start)
    assert all(torch.equal(x, found[0]) for x in found)


def test_its_default_is_without_a_proximal_term():
    assert FedAsync() == FedAsync(mu=0) and hs.methods.Method.parse("FedAsync(mu=0.1)").mu == 0.1
    assert FedAsync(batch=5).full() != FedProx(batch=5).full()
