"""FedAvg-M, FedAvg-M-VR, SCAFFOLD-M and SCAFFOLD-M-VR against their formulas and the rules they contain."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save

import hanse as hs
from hanse.core.optim import exponential, sgd
from hanse.core.samples import Plan
from hanse.core.wire import wire_size
from hanse.methods import FedAvg, FedAvg_M, FedAvg_M_VR, Scaffold, Scaffold_M, Scaffold_M_VR

FOUR = [FedAvg_M, FedAvg_M_VR, Scaffold_M, Scaffold_M_VR]


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---- what the rules contain


@pytest.mark.parametrize("rule", [FedAvg_M, FedAvg_M_VR])
def test_beta_one_is_fedavg(digits, follow, rule):
    """Bit for bit for FedAvg-M: 1 * gradient + 0 * g and x + mean Delta are exact. The -VR rule adds 0 * (finite)."""
    ours = follow(digits, rule(beta=1, lr=0.3, steps=5), 3)
    plain = follow(digits, FedAvg(lr=0.3, steps=5, weights="uniform"), 3)
    assert all(torch.equal(a.x, b.x) for a, b in zip(ours, plain, strict=True))


def test_beta_one_is_fedavg_also_with_gamma_given_or_shortcuts_taken(digits, follow):
    plain = follow(digits, FedAvg(lr=0.3, steps=5, weights="uniform"), 3, shortcuts=True)
    close(follow(digits, FedAvg_M(beta=1, lr=0.3, steps=5, gamma=0.3 * 5), 3)[-1].x, plain[-1].x, 1e-12)


@pytest.mark.parametrize("rule", [Scaffold_M, Scaffold_M_VR])
def test_beta_one_is_scaffold(digits, follow, rule):
    ours = follow(digits, rule(beta=1, lr=0.3, steps=5), 5, cohort=3)
    plain = follow(digits, Scaffold(lr=0.3, steps=5), 5, cohort=3)
    for a, b in zip(ours, plain, strict=True):
        close(a.x, b.x, 1e-10)
        close(a.kept["c"], b.kept["c"], 1e-10)


def gradient(federation, x, batch):
    """One client's batch gradient by plain autograd."""
    x = x.detach().requires_grad_(True)
    p = federation.problem.layout.views(x)
    output = F.relu(batch.x[0] @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]
    return torch.autograd.grad(F.cross_entropy(output, batch.y[0]), x)[0]


def batches(federation, t):
    """The single batch of every client in round ``t``."""
    return [one_client(federation, Plan(batch=8, steps=1), i, t)[0] for i in range(federation.clients)]


def one_client(federation, plan, client, round):
    """What one client goes through in a round."""
    samples, ids = federation.split.train, torch.tensor([client])
    steps = plan.lengths(samples.counts(ids))
    return [batch for _, batch in plan.batches(samples, ids, federation.streams, torch.tensor([round]), steps)]


def averaged(federation, x, lots):
    return torch.stack([gradient(federation, x, batch) for batch in lots]).mean(0)


def test_one_step_of_all_clients_is_sgd_with_averaged_momentum(digits, follow):
    """m <- beta grad f(x; e) + (1 - beta) m; x <- x - gamma m, whatever the local rate, which may decay."""
    rounds = follow(digits, FedAvg_M(beta=0.3, gamma=0.5, steps=1, batch=8, lr=exponential(0.2, 0.9)), 6)
    x, m = digits.problem.start, 0
    for t, seen in enumerate(rounds):
        m = 0.3 * averaged(digits, x, batches(digits, t)) + 0.7 * m
        x = x - 0.5 * m
        close(seen.x, x, 1e-10)


def test_one_step_of_all_clients_with_variance_reduction_is_storm(digits, follow):
    """d_0 = grad f(x_0; e_0); d_t = grad f(x_t; e_t) + (1 - beta)(d_{t-1} - grad f(x_{t-1}; e_t)); x <- x - gamma d_t."""
    rounds = follow(digits, FedAvg_M_VR(beta=0.3, gamma=0.5, steps=1, batch=8, lr=exponential(0.2, 0.9)), 6)
    x, before, d = digits.problem.start, None, None
    for t, seen in enumerate(rounds):
        lots = batches(digits, t)
        fresh = averaged(digits, x, lots)
        d = fresh if d is None else fresh + 0.7 * (d - averaged(digits, before, lots))
        before, x = x, x - 0.5 * d
        close(seen.x, x, 1e-10)


# ---- the formulas, written out


def written_out(rule, bowls, cohorts):
    """The algorithm line by line on the quadratics; yields x, g, c and all c_i after every round."""
    beta, steps = rule.beta, rule.steps
    variates, reduced = isinstance(rule, Scaffold), isinstance(rule, FedAvg_M_VR)
    n, d = bowls.b.shape
    x = before = torch.zeros(d, dtype=torch.float64)
    g, c, ci = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(bowls.b)
    for t, cohort in enumerate(cohorts):
        eta = rule.lr.at(t)
        ends, new = [], ci.clone()
        for i in cohort:
            y, seen = x, []
            for _ in range(steps):
                fresh = bowls.a[i] * (y - bowls.b[i])
                seen.append(fresh)
                corrected = fresh - ci[i] + c if variates else fresh
                if not reduced:
                    step = beta * corrected + (1 - beta) * g
                elif t == 0:
                    step = corrected
                else:
                    step = fresh - beta * (ci[i] - c if variates else 0) + (1 - beta) * (g - bowls.a[i] * (before - bowls.b[i]))
                y = y - eta * step
            ends.append(y)
            new[i] = torch.stack(seen).mean(0)
        g = (x - torch.stack(ends).mean(0)) / (eta * steps)
        before, x = x, x - (rule.gamma or eta * steps) * g
        if variates:
            c, ci = c + (new - ci).sum(0) / n, new
        yield x, g, c, ci


@pytest.mark.parametrize("gamma", [None, 0.7])
@pytest.mark.parametrize("kind", FOUR)
def test_every_round_is_the_algorithm_written_out(quadratics, bowls, follow, kind, gamma):
    """Three of ten clients, decaying rate. For SCAFFOLD-M this also compares c_i from the end point with the mean gradient."""
    rule = kind(lr=exponential(0.1, 0.95), beta=0.2, steps=4, gamma=gamma)
    rounds = follow(quadratics, rule, 15, cohort=3)
    literal = written_out(rule, bowls, [seen.record["cohort"] for seen in rounds])
    for seen, (x, g, c, ci) in zip(rounds, literal, strict=True):
        close(seen.x, x, 1e-10)
        close(seen.state["g"], g, 1e-10)
        if "c" in seen.state:
            close(seen.state["c"], c, 1e-10)
            close(seen.kept["c"], ci, 1e-10)


def test_the_two_formulas_for_the_control_variate_agree(digits, follow, listen):
    """From the end point, and as the mean of the gradients seen, with minibatches and absent clients."""
    pairs = []

    class Overheard(Scaffold_M):
        abstract: ClassVar[bool] = True

        def train(self, ctx):
            gradients = listen(ctx)
            upload = super().train(ctx)
            pairs.append((ctx.state["c"], torch.stack(gradients).mean(0)))
            return upload

    follow(digits, Overheard(lr=0.3, steps=5, batch=16), 8, cohort=3)
    assert len(pairs) == 8
    for from_the_end, mean in pairs:
        close(from_the_end, mean, 1e-10)


class Ragged(FedAvg_M):
    """Clients stop after one pass over their data."""

    abstract: ClassVar[bool] = True

    def plan(self):
        return Plan(batch=16, epochs=1)


def test_a_client_that_stops_early_counts_with_its_mean_direction(digits, follow):
    """With beta = 1, g is the mean over clients of the mean gradient each one saw, however many steps it took."""
    rule = Ragged(lr=0.3, beta=1, steps=10)
    steps = rule.plan().lengths(digits.split.train.counts())
    assert len(set(steps.tolist())) > 1
    alone = []
    for i in range(digits.clients):
        w = digits.problem.start
        for batch in one_client(digits, rule.plan(), i, 0):
            w = w - 0.3 * gradient(digits, w, batch)
        alone.append((digits.problem.start - w) / 0.3 / int(steps[i]))
    close(follow(digits, rule, 1)[-1].state["g"], torch.stack(alone).mean(0), 1e-10)


# ---- where they end


def test_momentum_scales_the_drift_of_fedavg_and_does_not_remove_it(quadratics, bowls, follow):
    """The limit of FedAvg-M is that of FedAvg with the rate beta * lr: a tenth of the way from the optimum, nearly."""
    x = follow(quadratics, FedAvg_M(lr=0.1, beta=0.1, steps=10, shuffle=False), 420)[-1].x
    close(x, bowls.fedavg_limit(0.01, 10), 1e-12)
    assert bowls.distance(x) == pytest.approx(0.028, abs=0.001)
    assert bowls.distance(bowls.fedavg_limit(0.1, 10)) == pytest.approx(0.28, abs=0.01)


@pytest.mark.parametrize("beta", [0.3, 0.6])
def test_variance_reduction_keeps_the_limit_of_fedavg_whatever_beta(quadratics, bowls, follow, beta):
    x = follow(quadratics, FedAvg_M_VR(lr=0.1, beta=beta, steps=10), 200)[-1].x
    close(x, bowls.fedavg_limit(0.1, 10), 1e-12)


@pytest.mark.parametrize("cohort", [3, 10])
@pytest.mark.parametrize("rule", [Scaffold_M, Scaffold_M_VR])
def test_control_variates_reach_the_optimum(quadratics, bowls, follow, rule, cohort):
    assert bowls.distance(follow(quadratics, rule(lr=0.1, steps=10, shuffle=False), 400, cohort=cohort)[-1].x) < 1e-10


# ---- what is sent


@pytest.mark.parametrize(
    ("rule", "down", "up"),
    [
        (FedAvg, ["x"], ["delta"]),
        (FedAvg_M, ["x", "g"], ["delta"]),
        (FedAvg_M_VR, ["x", "g"], ["delta"]),
        (Scaffold, ["x", "c"], ["delta", "change"]),
        (Scaffold_M, ["x", "g", "c"], ["delta", "change"]),
        (Scaffold_M_VR, ["x", "g", "c"], ["delta", "change"]),
    ],
)
def test_bytes_are_the_vectors_of_the_formula_and_framing(rule, down, up):
    """4 bytes a number, and what a safetensors file with these names adds: a header, a weight, a loss, for -VR the number gamma."""
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6)
    size = federation.problem.shared
    engine = hs.engines.local(path="stacked", chunk=4, workers=1, threads=1)
    history = hs.run(federation, rule(steps=2), hs.schedules.synchronous(cohort=4), rounds=2, evaluate=0, engine=engine).history
    one = {"gamma": torch.zeros(1)} if issubclass(rule, FedAvg_M_VR) else {}
    sent = {n: torch.zeros(size) for n in down} | one
    back = {n: torch.zeros(size) for n in up} | {"weight": torch.zeros(1), "loss": torch.zeros(1)}
    for tensors in (sent, back):
        assert wire_size(tensors) == len(save(tensors))
    assert 0 < wire_size(sent) - 4 * size * len(down) < 300 and 0 < wire_size(back) - 4 * size * len(up) < 300
    for t, record in enumerate(history, 1):
        assert record["bytes_down"] == 4 * t * wire_size(sent)
        assert record["bytes_up"] == 4 * t * wire_size(back)


# ---- what is refused


def test_local_work_is_counted_in_steps():
    with pytest.raises(hs.ConfigError, match=r"FedAvg_M.epochs: 2 is not allowed"):
        FedAvg_M(epochs=2)


@pytest.mark.parametrize("wrong", [{"server_lr": 0.5}, {"server": sgd(momentum=0.9)}])
def test_the_step_of_the_server_is_set_by_gamma(wrong):
    with pytest.raises(hs.ConfigError, match="set gamma"):
        FedAvg_M(**wrong)


@pytest.mark.parametrize("beta", [0, 1.5])
def test_beta_is_a_share(beta):
    with pytest.raises(hs.ConfigError, match=r"beta: .* is not allowed"):
        Scaffold_M(beta=beta)


def test_scaffold_kinds_average_uniformly():
    with pytest.raises(hs.ConfigError, match=r"weights: 'samples' is not allowed"):
        Scaffold_M(weights="samples")
