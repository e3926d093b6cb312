"""FedAvg and the rules that are FedAvg with one thing changed: FedProx, SCAFFOLD, FedOpt."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import hanse as hs
from hanse.core.optim import adaptive, exponential, sgd
from hanse.methods import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Method, Scaffold

FAMILY = ["FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedAvg_M", "FedAvg_M_VR", "FedProx", "FedSpeed", "FedYogi", "Scaffold"]
FAMILY += ["Scaffold_M", "Scaffold_M_VR"]


def same(a, b):
    return all(torch.equal(x.x, y.x) for x, y in zip(a, b, strict=True))


def batches(federation, plan, client, round):
    """What one client goes through in a round."""
    samples, ids = federation.split.train, torch.tensor([client])
    steps = plan.lengths(samples.counts(ids))
    return [batch for _, batch in plan.batches(samples, ids, federation.streams, torch.tensor([round]), steps)]


def test_fedavg_equals_a_plain_pytorch_loop(digits, follow):
    """Two rounds with all clients: one model after the other, autograd, sample-weighted average; only the batches are shared."""
    rule = FedAvg(lr=0.3, epochs=2, batch=16)
    rounds = follow(digits, rule, 2)
    samples, layout = digits.split.train, digits.problem.layout
    x = digits.problem.start.clone()
    for t in range(2):
        total = torch.zeros_like(x)
        for i in range(6):
            w = x.clone()
            for batch in batches(digits, rule.plan(), i, t):
                w.requires_grad_(True)
                p = layout.views(w)
                output = F.relu(batch.x[0] @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]
                (gradient,) = torch.autograd.grad(F.cross_entropy(output, batch.y[0]), w)
                w = w.detach() - 0.3 * gradient
            total += float(samples.counts()[i]) * (w - x)
        x = x + total / samples.counts().sum()
        torch.testing.assert_close(rounds[t].x, x, rtol=0, atol=1e-12)


def test_shortcuts_change_no_more_than_the_order_of_sums(digits, follow):
    rule = FedAvg(lr=0.3, epochs=2, batch=16)
    plain, short = follow(digits, rule, 3), follow(digits, rule, 3, shortcuts=True)
    torch.testing.assert_close(short[-1].x, plain[-1].x, rtol=0, atol=1e-12)


def test_weights_are_sample_counts_or_equal(quadratics, digits, follow):
    by_samples, uniform = (follow(digits, FedAvg(lr=0.3, weights=w), 1)[-1].x for w in ("samples", "uniform"))
    assert not torch.allclose(by_samples, uniform)
    equal = [follow(quadratics, FedAvg(weights=w, steps=3), 2) for w in ("samples", "uniform")]  # every client has one sample
    assert same(*equal)


def test_the_formula_of_the_quadratics_is_their_gradient(quadratics, follow):
    """The other tests replace automatic differentiation by the formula."""
    nets = []
    hs.run(
        quadratics,
        FedAvg(lr=0.1, steps=3),
        rounds=4,
        evaluate=0,
        engine=hs.engines.local(path="vmap", chunk=10, workers=1, threads=1),
        on_start=nets.append,
    )
    torch.testing.assert_close(nets[0].state["x"], follow(quadratics, FedAvg(lr=0.1, steps=3), 4)[-1].x, rtol=0, atol=1e-12)


def test_fedavg_stops_short_of_the_optimum_of_heterogeneous_quadratics(quadratics, bowls, follow):
    """The clients' drift: with 10 local steps of rate 0.1 the limit is 0.28 away, and exactly the fixed point of the affine map."""
    x = follow(quadratics, FedAvg(lr=0.1, steps=10), 80)[-1].x
    torch.testing.assert_close(x, bowls.fedavg_limit(0.1, 10), rtol=0, atol=1e-12)
    assert bowls.distance(x) == pytest.approx(0.28, abs=0.01)


def test_fedprox_without_its_term_is_fedavg(digits, follow):
    assert same(follow(digits, FedProx(mu=0, lr=0.3), 3), follow(digits, FedAvg(lr=0.3), 3))


def test_fedprox_reaches_its_own_fixed_point(quadratics, bowls, follow):
    x = follow(quadratics, FedProx(mu=1, lr=0.1, steps=10), 120)[-1].x
    torch.testing.assert_close(x, bowls.fedavg_limit(0.1, 10, mu=1), rtol=0, atol=1e-12)
    assert bowls.distance(x) == pytest.approx(0.23, abs=0.02)


@pytest.mark.parametrize("second", ["adam", "yogi"])
def test_fedopt_with_fixed_v_is_fedavg(digits, follow, second):
    """b1 = 0 makes m the displacement, b2 = 1 keeps v at its start tau^2 = 1, and server_lr Delta / (1 + 1) is exact."""
    rule = FedAdam(lr=0.3, server=adaptive(second=second, b1=0, b2=1, tau=1), server_lr=2)
    assert same(follow(digits, rule, 3), follow(digits, FedAvg(lr=0.3), 3))


def test_server_momentum_zero_is_fedavg(digits, follow):
    assert same(follow(digits, FedAvgM(lr=0.3, server=sgd(momentum=0)), 3), follow(digits, FedAvg(lr=0.3), 3))


def second_moment(rule, v, delta):
    match rule:
        case FedAdagrad():
            return v + delta**2
        case FedYogi():
            return v - 0.01 * delta**2 * torch.sign(v - delta**2)
        case _:
            return 0.99 * v + 0.01 * delta**2


@pytest.mark.parametrize("rule", [FedAdagrad(lr=0.3), FedYogi(lr=0.3), FedAdam(lr=0.3)], ids=str)
def test_fedopt_follows_algorithm_2(digits, follow, rule):
    """Displacements are recovered from FedAvg, which takes the same first step from the same point in every round."""
    x = digits.problem.start
    m, v, b1 = torch.zeros_like(x), torch.full_like(x, 1e-6), 0.0 if isinstance(rule, FedAdagrad) else 0.9
    rounds = follow(digits, rule, 3)
    for t, seen in enumerate(rounds):
        delta = displacement(digits, x, t, 0.3)
        m, v = b1 * m + (1 - b1) * delta, second_moment(rule, v, delta)
        x = x + rule.server_lr * m / (v.sqrt() + 1e-3)
        torch.testing.assert_close(seen.x, x, rtol=0, atol=1e-10)


def test_fedavgm_is_a_heavy_ball(digits, follow):
    x, u = digits.problem.start, 0
    for t, seen in enumerate(follow(digits, FedAvgM(lr=0.3), 3)):
        u = 0.9 * u + displacement(digits, x, t, 0.3)
        x = x + u
        torch.testing.assert_close(seen.x, x, rtol=0, atol=1e-12)


def displacement(federation, x, t, lr):
    """Sample-weighted mean displacement of one epoch of plain SGD from ``x`` with the batches of round ``t``."""
    samples, problem = federation.split.train, federation.problem
    total = torch.zeros_like(x)
    for i in range(federation.clients):
        w = x.clone()
        for batch in batches(federation, FedAvg().plan(), i, t):
            w.requires_grad_(True)
            loss = F.cross_entropy(problem.output(w, problem.start_buffers, batch.x[0]), batch.y[0])
            w = w.detach() - lr * torch.autograd.grad(loss, w)[0]
        total += float(samples.counts()[i]) * (w - x)
    return total / samples.counts().sum()


@pytest.mark.parametrize("rule", [FedAdam(lr=0.1), hs.methods.FedAvg_M(lr=0.1), hs.methods.FedSpeed(lr=0.1)], ids=str)
def test_a_round_without_clients_changes_nothing(quadratics, follow, rule):
    """With one client expected of ten, some rounds have none: the model, moments, directions and corrections stay."""
    rounds = follow(quadratics, rule, 12, cohort=1, draw="bernoulli")
    idle = 0
    for before, after in pairwise(rounds):
        if before.record["bytes_up"] == after.record["bytes_up"]:
            idle += 1
            assert all(torch.equal(before.state[n], after.state[n]) for n in after.state)
            assert all(torch.equal(before.kept[n], after.kept[n]) for n in after.kept)
        else:
            assert not torch.equal(before.x, after.x)
    assert 0 < idle < 11


def test_scaffold_reaches_the_optimum_with_some_clients_absent(quadratics, bowls, follow):
    """Uniform averages of displacements and of control variates, c over all N clients: the drift is gone."""
    assert bowls.distance(follow(quadratics, Scaffold(lr=0.1, steps=10), 200, cohort=3)[-1].x) < 1e-10


def test_scaffold_keeps_the_mean_gradient_of_each_client(digits, follow):
    """Option II says that c_i is the mean of the gradients of the client's last round, and c the mean of all c_i."""
    for seen in follow(digits, Scaffold(lr=0.3, batch=16), 3, cohort=3):
        torch.testing.assert_close(seen.state["c"], seen.kept["c"].mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [Scaffold, hs.methods.FedAvg_M, hs.methods.Scaffold_M_VR])
def test_rules_that_need_plain_sgd_refuse_anything_else(rule):
    with pytest.raises(hs.ConfigError, match=r"local: sgd\(momentum=0.9\) is not allowed: .*plain sgd"):
        rule(local=sgd(momentum=0.9))


@pytest.mark.parametrize("name", FAMILY)
def test_a_batch_of_clients_equals_one_client_at_a_time(digits, follow, name):
    """Unequal clients side by side, in twos, or alone, by two ways to compute gradients: the same to 1e-10."""
    rule = Method.named(name)(lr=0.2, batch=16)
    reference = follow(digits, rule, 2, cohort=4)
    for how in ({"chunk": 1}, {"chunk": 2}, {"chunk": 1, "path": "loop"}):
        other = follow(digits, rule, 2, cohort=4, **how)
        torch.testing.assert_close(other[-1].x, reference[-1].x, rtol=0, atol=1e-10)
        for kept, rows in reference[-1].kept.items():
            torch.testing.assert_close(other[-1].kept[kept], rows, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILY)
def test_a_rule_reads_back_from_its_text(name):
    rule = Method.named(name)(lr=exponential(0.2, 0.99), batch=5)
    assert Method.parse(str(rule)) == rule


def test_local_and_server_momentum_are_two_rules():
    assert Method.parse("fedavg-m") == hs.methods.FedAvg_M()
    assert Method.parse("FedAvgM") == FedAvgM()
