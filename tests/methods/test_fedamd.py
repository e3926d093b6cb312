"""FedAMD against its formulas and the methods that it contains."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

import hanse as hs
from hanse.core.optim import exponential, sgd
from hanse.core.samples import Plan
from hanse.core.wire import wire_size
from hanse.methods import FedAMD
from hanse.methods.fedamd import anchor_probability

EVERYTHING = 2000
"""A batch that holds all samples of any client."""


def close(a, b, atol):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


class Heard(NamedTuple):
    """One batch of clients' work: what they got, who they are, for which rounds, who was an anchor, what they sent."""

    message: dict[str, Tensor]
    ids: Tensor
    rounds: Tensor
    anchors: Tensor
    sums: dict[str, Tensor]


@pytest.fixture
def heard(monkeypatch):
    """Everything that clients do from now on, in order."""
    seen, train = [], FedAMD.train

    def listening(self, ctx):
        upload = train(self, ctx)
        assert torch.equal(upload.senders["delta"], ~upload.senders["change"])
        seen.append(Heard(ctx.message, ctx.ids, ctx.rounds, upload.senders["change"], dict(upload.sums)))
        return upload

    monkeypatch.setattr(FedAMD, "train", listening)
    return seen


def gradient(problem, w, batch):
    """By autograd, of one client's batch."""
    w = w.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(problem.output(w, problem.start_buffers, batch.x[0]), batch.y[0]), w)[0]


# ---- what the rule contains


def test_with_one_step_all_miners_send_the_same_gradient_step(digits, follow, heard):
    """Bit for bit, whatever batches they drew: lr times the cached average."""
    follow(digits, FedAMD(lr=0.3, steps=1, batch=8, p=0.4), 6)
    miners = [round.sums["delta"][~round.anchors] for round in heard]
    assert {len(sent) for sent in miners} > {2, 3}
    for round, sent in zip(heard, miners, strict=True):
        assert torch.equal(sent, sent[:1].expand_as(sent))
        close(sent, (-0.3 * round.message["v"]).expand_as(sent), 1e-15)


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_two_sequential_rounds_of_all_clients_are_a_step_of_gradient_descent(quadratics, bowls, follow, server_lr):
    seen = follow(quadratics, FedAMD(period=2, steps=1, lr=0.1, server_lr=server_lr, batch=EVERYTHING), 8)
    x = torch.zeros_like(bowls.best)
    for after_anchors, after_miners in zip(seen[::2], seen[1::2], strict=True):
        close(after_anchors.x, x, 1e-12)
        loss = float((bowls.a * (x - bowls.b) ** 2).sum(1).mean() / 2)
        assert after_anchors.record["loss"] == pytest.approx(loss) and after_miners.record["loss"] == pytest.approx(loss)
        x = x - server_lr * 0.1 * bowls.grad(x).mean(0)
        close(after_miners.x, x, 1e-12)


# ---- the formulas, written out


def test_with_full_batches_the_recursion_telescopes(digits, follow):
    """After k steps g = vbar + grad f_m(x_k) - grad f_m(x)."""
    errors = []

    class Checked(FedAMD):
        abstract: ClassVar[bool] = True

        def direction(self, ctx, w, batch):
            g = super().direction(ctx, w, batch)
            here, there = (ctx.path.grad(at, batch, ctx.buffers)[0] for at in (w, ctx.start.expand_as(w)))
            errors.append(float((g - (ctx.message["v"] + here - there)).abs().max()))
            return g

    follow(digits, Checked(lr=0.3, steps=6, batch=EVERYTHING), 3, cohort=4)
    assert len(errors) == 3 * 6
    assert max(errors) < 1e-10


def test_a_miner_takes_both_gradients_of_a_step_on_one_batch(digits, follow, heard):
    problem, rule = digits.problem, FedAMD(lr=0.3, steps=4, batch=8, p=0.4)
    follow(digits, rule, 3, cohort=4)
    for round in heard:
        for i, key, anchor, sent in zip(round.ids, round.rounds, round.anchors, round.sums["delta"], strict=True):
            x, before, g = round.message["x"], None, round.message["v"]
            for _, batch in rule.plan().batches(digits.split.train, i[None], digits.streams, key[None], torch.tensor([4])):
                if before is not None:
                    g = g - gradient(problem, before, batch) + gradient(problem, x, batch)
                before, x = x, x - 0.3 * g
            close(sent, torch.zeros_like(x) if anchor else x - round.message["x"], 1e-12)


def test_every_round_is_the_algorithm_written_out(quadratics, bowls, follow, heard):
    """Three of ten clients, decaying rate, a server rate; anchors report v_new - v, and absent clients keep theirs."""
    rule = FedAMD(lr=exponential(0.1, 0.95), steps=4, p=0.4, server_lr=0.7)
    seen = follow(quadratics, rule, 20, cohort=3)
    x = torch.zeros_like(bowls.best)
    v = bowls.grad(x)
    for t, (work, after) in enumerate(zip(heard, seen, strict=True)):
        vbar, old, ends = v.mean(0), v.clone(), []
        close(work.message["v"], vbar, 1e-10)
        for i, anchor in zip(work.ids.tolist(), work.anchors.tolist(), strict=True):
            if anchor:
                v[i] = bowls.grad(x)[i]
                continue
            y, before, g = x, x, vbar
            for _ in range(4):
                g = g - bowls.grad(before)[i] + bowls.grad(y)[i]
                before, y = y, y - rule.lr.at(t) * g
            ends.append(x - y)
        x = x - 0.7 * torch.stack(ends).mean(0) if ends else x
        close(after.x, x, 1e-10)
        close(after.kept["v"], v, 1e-10)
        close(after.state["v"], vbar + (v - old).sum(0) / 10, 1e-10)
    assert {int(work.anchors.sum()) for work in heard} == {0, 1, 2, 3}


def test_an_anchor_may_take_some_of_its_samples(digits, follow):
    """v_m from the opening is the gradient over that many samples, drawn without repetition."""
    kept = follow(digits, FedAMD(anchor_batch=8, p=0), 1)[-1].kept["v"]
    problem, train, key, one = digits.problem, digits.split.train, torch.zeros(1, dtype=torch.long), torch.ones(1).long()
    for i in range(digits.clients):
        ((_, batch),) = Plan(8).batches(train, torch.tensor([i]), digits.streams, key, one)
        close(kept[i], gradient(problem, problem.start, batch), 1e-12)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(p=st.sampled_from([0.0, 0.3, 0.9]), cohort=st.integers(1, 6), steps=st.integers(1, 3))
def test_vbar_is_the_mean_of_what_clients_keep(digits, follow, p, cohort, steps):
    for seen in follow(digits, FedAMD(lr=0.3, p=p, steps=steps, batch=16), 4, cohort=cohort):
        close(seen.state["v"], seen.kept["v"].mean(0), 1e-12)


def test_vbar_is_that_mean_in_single_precision(follow):
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6)
    for seen in follow(federation, FedAMD(lr=0.3, p=0.5), 30, cohort=3):
        close(seen.state["v"], seen.kept["v"].mean(0), 1e-6)


# ---- two kinds of participants


@pytest.mark.parametrize("server", [sgd(), sgd(momentum=0.9)])
def test_anchors_never_change_x_and_miners_never_change_vbar(digits, follow, server):
    seen = follow(digits, FedAMD(lr=0.1, period=3, server=server), 9, cohort=4)
    for t, (before, after) in enumerate(pairwise(seen), 1):
        assert torch.equal(before.x, after.x) == (t % 3 == 0)
        assert torch.equal(before.state["v"], after.state["v"]) == (t % 3 != 0)


def test_roles_are_drawn_per_participant_with_probability_p(quadratics, follow, heard):
    follow(quadratics, FedAMD(steps=1, p=0.3), 60)
    roles = torch.stack([work.anchors for work in heard])
    assert 600 * 0.3 - 3 * 11.2 < int(roles.sum()) < 600 * 0.3 + 3 * 11.2  # a standard deviation is 11.2
    assert not torch.equal(roles[0], roles[1])
    assert not torch.equal(roles[:, 0], roles[:, 1])


def test_without_anchors_vbar_stays_that_of_the_start(digits, follow):
    first, *others = follow(digits, FedAMD(lr=0.3, p=0), 5, cohort=3)
    assert all(torch.equal(seen.state["v"], first.state["v"]) for seen in others)


def test_clients_away_at_the_start_count_as_zero_until_they_are_anchors(follow, heard):
    absent = hs.fleet.ideal(trace=hs.fleet.bernoulli(rate=0.5))
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, fleet=absent, dtype="float64")
    there = absent.trace.online(federation.population, torch.arange(6), 0.0, 0)
    assert 0 < int(there.sum()) < 6
    rounds = follow(federation, FedAMD(lr=0.3, p=0.5), 12, cohort=4)
    zero, ever = ~there, torch.zeros(6, dtype=torch.bool)
    for seen, work in zip(rounds, heard, strict=True):
        ever[work.ids[work.anchors]] = True
        assert torch.equal((seen.kept["v"] == 0).all(1), zero & ~ever)
        close(seen.state["v"], seen.kept["v"].mean(0), 1e-12)
    assert bool((zero & ever).any())


def test_a_start_without_anybody_leaves_vbar_zero(follow):
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, fleet=hs.fleet.ideal(trace=hs.fleet.bernoulli(rate=1e-6)))
    assert not follow(federation, FedAMD(), 2)[-1].state["v"].any()


def test_it_reaches_the_optimum_with_clients_absent(quadratics, bowls, follow):
    """FedAvg with all of them stops short of it."""
    x = follow(quadratics, FedAMD(lr=0.05, steps=3, p=0.6), 150, cohort=3)[-1].x
    assert bowls.distance(x) < 1e-5
    assert bowls.distance(bowls.fedavg_limit(0.05, 3)) > 1e-2


# ---- batches of clients


@pytest.mark.parametrize("work", [{"steps": 5}, {"steps": None, "epochs": 2}, {"anchor_batch": 8, "period": 3}])
def test_batched_equals_one_client_at_a_time(digits, follow, work):
    rule = FedAMD(lr=0.3, batch=16, p=0.4, **work)
    together, alone = (follow(digits, rule, 4, cohort=4, **how)[-1] for how in ({}, {"path": "loop", "chunk": 1}))
    close(together.x, alone.x, 1e-10)
    close(together.state["v"], alone.state["v"], 1e-10)
    close(together.kept["v"], alone.kept["v"], 1e-10)
    assert together.record["loss"] == pytest.approx(alone.record["loss"], abs=1e-10)


def test_clients_from_different_versions_work_side_by_side():
    """Asynchronously, with a rate that decays: batched equals one at a time, and the books balance."""
    fleet = hs.fleet.devices(step="evenly(0.1, 0.4)")
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, partition=hs.dirichlet(0.5), fleet=fleet, dtype="float64")
    rule, nets = FedAMD(lr=exponential(0.3, 0.9), batch=16, p=0.4), []
    for chunk in (6, 1):
        engine = hs.engines.local(path="stacked", chunk=chunk, workers=1, threads=1)
        schedule = hs.schedules.fedbuff(buffer=2)
        hs.run(federation, rule, schedule, rounds=5, evaluate=0, engine=engine, on_start=nets.append)
        kept = nets[-1].kept.read(torch.arange(6))["v"]
        close(nets[-1].state["v"], kept.mean(0), 1e-12)
    close(nets[0].state["x"], nets[1].state["x"], 1e-10)


# ---- what is sent, what is refused


@pytest.mark.parametrize(("rule", "more"), [(FedAMD(p=0.5), {}), (FedAMD(period=2), {"p": torch.zeros(1)})])
def test_every_participant_gets_two_vectors_and_sends_one(follow, heard, rule, more):
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6)
    vector, tail = torch.zeros(federation.problem.shared), {"weight": torch.zeros(1), "loss": torch.zeros(1)}
    down = {"x": vector, "v": vector} | more
    size = {name: len(save({name: vector} | tail)) for name in ("v", "change", "delta")}
    assert all(4 * len(vector) < n < 4 * len(vector) + 300 for n in size.values())
    up = 6 * size["v"]
    for t, (seen, work) in enumerate(zip(follow(federation, rule, 4, cohort=4), heard, strict=True), 1):
        up += int(work.anchors.sum()) * size["change"] + int((~work.anchors).sum()) * size["delta"]
        assert seen.record["bytes_up"] == up
        assert seen.record["bytes_down"] == (6 + 4 * t) * wire_size(down)


@pytest.mark.parametrize("r", [1, 2, 10, 1000])
def test_the_closed_form_for_p(r):
    """sqrt(4 r^2 + 2 r) - 2 r is the positive root of p^2 + 4 r p - 2 r."""
    p = anchor_probability(10 * r, 10)
    assert p * p + 4 * r * p == pytest.approx(2 * r)
    assert 0.44 < p < 0.5


class normed(hs.tasks.digits):
    """Digits through batch norm."""

    abstract: ClassVar[bool] = True

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def test_batch_norm_is_refused():
    with pytest.raises(hs.ConfigError, match="FedAMD: a model with batch norm is not allowed"):
        hs.run(hs.Federation(normed(), clients=6), FedAMD(), hs.schedules.synchronous(cohort=3), rounds=1)


@pytest.mark.parametrize("wrong", [{"p": 1}, {"p": -0.1}, {"period": 1}, {"weights": "samples"}, {"local": sgd(momentum=0.9)}])
def test_settings_that_are_not_fedamd_are_refused(wrong):
    with pytest.raises(hs.ConfigError, match=next(iter(wrong))):
        FedAMD(**wrong)
