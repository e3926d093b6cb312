"""FedSpeed against its formulas, its reductions and its fixed point."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch

import hanse as hs
from hanse.core.optim import cosine, exponential
from hanse.methods import FedAvg, FedProx, FedSpeed


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def same(a, b):
    return all(torch.equal(x.x, y.x) for x, y in zip(a, b, strict=True))


# ---- reductions


@pytest.mark.parametrize("mode", ["all", "selected"])
def test_everything_off_is_fedavg(digits, follow, mode):
    """Bit for bit in one arrangement: the proximal term is a product with 1 / inf = 0, and adding zeros is exact."""
    off = FedSpeed(lr=0.3, lam=math.inf, rho=0, correction=False, mode=mode)
    assert same(follow(digits, off, 3, cohort=4), follow(digits, FedAvg(lr=0.3, weights="uniform"), 3, cohort=4))


def test_without_the_correction_it_is_fedprox(digits, follow):
    ours = FedSpeed(lr=0.3, lam=10, rho=0, correction=False)
    assert same(follow(digits, ours, 3, cohort=4), follow(digits, FedProx(mu=1 / 10, lr=0.3, weights="uniform"), 3, cohort=4))


def test_a_weak_pull_alone_is_not_fedavg(digits, follow):
    """h still accumulates, so lam = inf must be used together with correction=False."""
    ours = follow(digits, FedSpeed(lr=0.3, lam=1e12, rho=0), 3, cohort=4)
    assert not torch.allclose(ours[-1].x, follow(digits, FedAvg(lr=0.3, weights="uniform"), 3, cohort=4)[-1].x, atol=1e-3)


@pytest.mark.parametrize("off", [{"rho": 0}, {"alpha": 0}])
def test_rho_or_alpha_zero_takes_the_plain_gradient(digits, follow, off):
    one = follow(digits, FedSpeed(lr=0.3, **off), 2)
    other = follow(digits, FedSpeed(lr=0.3, rho=0, alpha=0), 2)
    assert same(one, other)


def test_the_modes_agree_when_every_client_takes_part(digits, follow):
    every, chosen = (follow(digits, FedSpeed(lr=0.3, mode=mode), 3)[-1].x for mode in ("all", "selected"))
    close(every, chosen, 1e-12)


# ---- the formulas, written out


@pytest.mark.parametrize("mode", ["all", "selected"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_every_round_is_the_algorithm_written_out(quadratics, bowls, follow, alpha, mode):
    """The paper's form, with ghat = -h / lam, for three of ten clients and a decaying rate; and the identities that it obeys.

    With w_k = (1 - lr/lam)^(K-1-k) and c = 1 - (1 - lr/lam)^K, for every client and round,
    delta_K = -lr sum_k w_k (gq_k - ghat), and the new ghat is (1 - c) ghat + c (sum_k w_k gq_k / sum_k w_k).
    """
    steps, lam, rho = 5, 2.0, 0.3
    rule = FedSpeed(lr=exponential(0.1, 0.95), steps=steps, lam=lam, rho=rho, alpha=alpha, mode=mode)
    x, ghat = torch.zeros_like(bowls.best), torch.zeros_like(bowls.b)
    for t, seen in enumerate(follow(quadratics, rule, 12, cohort=3)):
        eta = rule.lr.at(t)
        old = ghat.clone()
        ends = []
        for i in seen.record["cohort"]:
            y, quasi = x, []
            for _ in range(steps):
                g1 = bowls.a[i] * (y - bowls.b[i])
                up = y + rho / (g1.norm() + 1e-7) * g1
                quasi.append((1 - alpha) * g1 + alpha * bowls.a[i] * (up - bowls.b[i]))
                y = y - eta * (quasi[-1] - old[i] + (y - x) / lam)
            ghat[i] = old[i] - (y - x) / lam
            ends.append(y if mode == "all" else y - lam * ghat[i])
            w = (1 - eta / lam) ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
            c = 1 - (1 - eta / lam) ** steps
            gq = torch.stack(quasi)
            kept = -seen.kept["h"] / lam
            close(-lam * (kept[i] - old[i]), -eta * (w @ (gq - old[i])), 1e-10)
            close(kept[i], (1 - c) * old[i] + c * (w @ gq) / w.sum(), 1e-10)
        x = torch.stack(ends).mean(0) - (lam * ghat.mean(0) if mode == "all" else 0)
        close(seen.x, x, 1e-10)
        close(-seen.kept["h"] / lam, ghat, 1e-10)


def test_ghat_is_a_moving_average_of_quasi_gradients(digits, follow, listen):
    """The same identities with minibatches of real data: 1e-10 in every round."""
    eta, lam, steps, alpha = 0.3, 2.0, 4, 0.7
    seen = []

    class Overheard(FedSpeed):
        abstract: ClassVar[bool] = True

        def train(self, ctx):
            before, gradients = ctx.state["h"].clone(), listen(ctx)
            upload = super().train(ctx)
            quasi = [(1 - alpha) * g1 + alpha * g2 for g1, g2 in zip(gradients[::2], gradients[1::2], strict=True)]
            seen.append((-before / lam, torch.stack(quasi), -ctx.state["h"] / lam))
            return upload

    follow(digits, Overheard(lr=eta, lam=lam, steps=steps, batch=16, alpha=alpha), 6, cohort=3)
    assert len(seen) == 6
    w = (1 - eta / lam) ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    c = 1 - (1 - eta / lam) ** steps
    for before, quasi, after in seen:
        close(-lam * (after - before), -eta * torch.einsum("k,kcp->cp", w, quasi - before), 1e-10)
        close(after, (1 - c) * before + c * torch.einsum("k,kcp->cp", w / w.sum(), quasi), 1e-10)


def test_the_correction_is_subtracted_as_ghat_and_added_as_h(quadratics, bowls, follow):
    """In its second round a client starts at x with the direction grad F_i(x) + h_i / lam; the other sign would not converge."""
    first, second = follow(quadratics, FedSpeed(lr=0.1, steps=1, lam=2, rho=0), 2)
    expected = -0.1 * (bowls.grad(first.x) + first.kept["h"] / 2)
    close(second.kept["h"] - first.kept["h"], expected, 1e-12)


def test_absent_clients_keep_their_state(digits, follow):
    before = torch.zeros(6, digits.problem.shared, dtype=torch.float64)
    for seen in follow(digits, FedSpeed(lr=0.3), 5, cohort=2):
        absent = [i for i in range(6) if i not in seen.record["cohort"]]
        assert torch.equal(seen.kept["h"][absent], before[absent])
        assert not torch.equal(seen.kept["h"], before)
        before = seen.kept["h"]


@pytest.mark.parametrize("weights", ["uniform", "samples"])
def test_the_server_holds_the_weighted_sum_of_all_corrections(digits, follow, weights):
    n = digits.split.train.counts().double() if weights == "samples" else torch.ones(6, dtype=torch.float64)
    for seen in follow(digits, FedSpeed(lr=0.3, weights=weights), 4, cohort=3):
        close(seen.state["h"], n @ seen.kept["h"], 1e-10)


# ---- where it ends


@pytest.mark.parametrize(("lam", "cohort", "rounds"), [(1, 10, 60), (10, 10, 520), (1, 3, 250), (10, 3, 2200)])
def test_it_reaches_the_optimum_and_the_corrections_are_the_gradients_there(quadratics, bowls, follow, lam, cohort, rounds):
    """FedAvg stops 0.28 and FedProx 0.23 from the optimum here."""
    last = follow(quadratics, FedSpeed(lr=0.1, steps=10, lam=lam, rho=0, shuffle=False), rounds, cohort=cohort)[-1]
    assert bowls.distance(last.x) < 1e-9
    ghat = -last.kept["h"] / lam
    close(ghat, bowls.grad(bowls.best), 1e-8)
    close(ghat.sum(0), torch.zeros_like(bowls.best), 1e-8)


@pytest.mark.parametrize("lam", [1, 10])
def test_mode_selected_does_not_converge_with_some_clients_absent(quadratics, bowls, follow, lam):
    """The cohort's mean h_i, about -lam times its mean gradient at the optimum, does not vanish."""
    rounds = follow(quadratics, FedSpeed(lr=0.1, steps=10, lam=lam, rho=0, mode="selected"), 100, cohort=3)
    assert min(bowls.distance(seen.x) for seen in rounds[-50:]) > lam


# ---- what is sent, what is refused


@pytest.mark.parametrize("mode", ["all", "selected"])
def test_it_sends_no_more_than_fedavg(mode):
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6)
    engine = hs.engines.local(path="stacked", chunk=4, workers=1, threads=1)
    costs = []
    for rule in (FedSpeed(mode=mode), FedAvg()):
        record = hs.run(federation, rule, hs.schedules.synchronous(cohort=4), rounds=3, evaluate=0, engine=engine).history[-1]
        costs.append((record["bytes_down"], record["bytes_up"]))
    assert costs[0] == costs[1]


@pytest.mark.parametrize("lr", [0.1, 0.2, exponential(0.1, 0.9)])
def test_the_rate_must_stay_below_lam(lr):
    with pytest.raises(hs.ConfigError, match=r"FedSpeed.lam: 0.1 is not allowed: it must exceed the learning rate"):
        FedSpeed(lr=lr, lam=0.1)


def test_a_rate_that_grows_past_lam_is_refused_in_its_round(quadratics, follow):
    rule = FedSpeed(lr=cosine(start=0.5, warmup=10), lam=0.2)
    with pytest.raises(hs.ConfigError, match=r"must exceed the learning rate, 0.2"):
        follow(quadratics, rule, 10)


def test_a_client_at_its_own_minimum_is_not_perturbed(follow):
    """|g1| = 0 must not divide by zero."""
    alone = hs.Federation(hs.tasks.quadratics(count=1), clients=1, partition=hs.natural(), dtype="float64")
    last = follow(alone, FedSpeed(lr=0.1, steps=5, rho=0.1, alpha=0.5), 3)[-1]
    assert bool(torch.isfinite(last.x).all())
