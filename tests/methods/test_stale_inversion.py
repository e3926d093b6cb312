"""Stale updates brought up to date: the unroll against what clients did, the search, and each decision of the server."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hanse as hs
from hanse.core.losses import squared_error
from hanse.core.messages import Reply
from hanse.core.optim import exponential
from hanse.core.problem import Problem
from hanse.methods import FedAvg, FirstOrder, StaleInversion
from hanse.methods.stale_inversion import largest, local_update, trust, unique
from hanse.schedules.fedfix import fedfix
from hanse.track.folder import Folder

ENGINE = hs.engines.local(path="stacked", chunk=6, workers=1, threads=1, shortcuts=False)
FULL = {"steps": 5, "batch": 600}


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def as_data(federation, client):
    """A client's samples and the logarithms of its labels as probabilities, as one D_rec."""
    x, y = federation.split.train.of(client)
    return x[None], 1e3 * F.one_hot(y, 10).to(x.dtype)[None]


class Overheard(StaleInversion):
    """Notes down every reply."""

    abstract: ClassVar[bool] = True
    heard: ClassVar[list[tuple[int, Reply]]] = []

    def step(self, state, reply, round):
        self.heard.append((round, reply))
        return super().step(state, reply, round)


@pytest.fixture
def heard():
    Overheard.heard.clear()
    return Overheard.heard


@pytest.fixture(scope="module")
def slow():
    """Three clients, of whom the first two need two and a half rounds; alone, the third cannot say what is usual."""
    fleet = hs.fleet.Fleet.parse("devices(job='listed((2.5, 2.5, 0.5))')")
    return hs.Federation(hs.tasks.digits(hidden=8), clients=3, partition=hs.dirichlet(0.3), fleet=fleet, dtype="float64")


def delayed(federation, rule, rounds, **options):
    return hs.run(federation, rule, fedfix(window=1.0, weights="plain"), rounds=rounds, evaluate=0, engine=ENGINE, **options)


@pytest.fixture(scope="module")
def linear():
    """A softmax model of 8 inputs and 4 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Problem(nn.Linear(8, 4), metrics={}, sample=torch.zeros(1, 8, dtype=torch.float64), dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates(problem, clients=3, lr=0.3, steps=1, start=None):
    """Models, and what clients with 20 samples each did to them; ``start``: to that one."""
    start = randn(clients, problem.shared) if start is None else start.expand(clients, -1)
    y = F.one_hot(randn(clients, 20, 4).argmax(-1), 4).double()
    return start, local_update(problem, start, randn(clients, 20, 8, seed=1), y, lr, steps) - start


def replied(problem, delta, versions, x, clients=None, **rest):
    """A reply of rows ``delta``; whatever the version, clients started from ``x``."""
    versions = torch.tensor(versions)
    clients = torch.arange(len(delta)) if clients is None else torch.tensor(clients)
    ones, starts = torch.ones(len(delta), dtype=delta.dtype), {v: {"x": x} for v in versions.tolist()}
    return Reply(clients, versions, ones, {}, {"delta": delta}, {}, ones, 10, starts, problem=problem, **rest)


# ---- the unroll is what clients do


def test_the_unroll_on_true_data_is_the_client_s_update(digits, follow, heard):
    follow(digits, Overheard(lr=0.3), 2)
    for round, reply in heard:
        start = reply.starts[round]["x"]
        for client, delta in zip(reply.clients.tolist(), reply.rows["delta"], strict=True):
            x, labels = as_data(digits, client)
            close(local_update(digits.problem, start[None], x, labels.softmax(-1), 0.3, 5)[0] - start, delta)


def test_true_data_cost_nothing_and_give_the_update_at_any_model(digits, follow, heard):
    rule = Overheard(lr=0.3)
    follow(digits, rule, 2)
    (_, first), (_, second) = heard
    x, labels = as_data(digits, 0)
    start, now = first.starts[0]["x"], second.starts[1]["x"]
    rate = torch.full((1, 1), 0.3, dtype=torch.float64)
    delta = {round: reply.rows["delta"][reply.clients == 0] for round, reply in heard}
    found, _, cost = rule.invert(digits.problem, start[None], delta[0], x, labels, rate, 3)
    assert float(cost[1]) < 1e-10 < float(cost[0]) and torch.equal(found, x)
    close(local_update(digits.problem, now[None], x, labels.softmax(-1), 0.3, 5) - now, delta[1])


def test_the_unroll_is_differentiable_through_all_steps(linear):
    """A detached step would leave the finite difference behind."""
    start, delta = updates(linear, 2, steps=3)
    assert torch.autograd.gradcheck(
        lambda x, labels: (local_update(linear, start, x, labels.softmax(-1), 0.3, 3) - start - delta).square().sum(),
        (randn(2, 3, 8, seed=2).requires_grad_(), randn(2, 3, 4, seed=3).requires_grad_()),
    )


# ---- the search


def test_a_softmax_model_is_inverted_with_as_many_samples_as_classes(linear):
    """One step's gradient has a rank below the number of classes. The cost falls 96-fold and more in 300 steps."""
    rule, five = StaleInversion(lr=0.3, steps=1, n_rec=4, n_it=300), torch.arange(5)
    start, delta = updates(linear, 5)
    rate = torch.full((5, 1), 0.3, dtype=torch.float64)
    x, labels = rule.noise(linear, five, five)
    first = (local_update(linear, start, x, labels.softmax(-1), rate, 1) - start - delta).abs().sum(1)
    _, _, cost = rule.invert(linear, start, delta, x, labels, rate, rule.n_it)
    assert float((first / cost[1]).min()) > 50


def test_searches_side_by_side_are_searches_one_at_a_time(linear):
    rule, versions = StaleInversion(steps=2, n_rec=3), torch.tensor([3, 1, 2])
    start, delta = updates(linear)
    rate = torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64)
    x, labels = rule.noise(linear, torch.arange(3), versions)
    together = rule.invert(linear, start, delta, x, labels, rate, 20)
    for i in range(3):
        one = [t[i : i + 1] for t in (start, delta, x, labels, rate)]
        for single, several in zip(rule.invert(linear, *one, 20), together, strict=True):
            close(single.squeeze(), (several[:, i] if several.shape == (2, 3) else several[i]).squeeze(), 1e-9)


def test_noise_is_drawn_for_client_and_version_and_held_to_the_box(linear):
    rule = StaleInversion(box=(-0.5, 1))
    x, labels = rule.noise(linear, torch.tensor([4, 4, 7]), torch.tensor([2, 3, 2]))
    assert x.shape == (3, 32, 8) and labels.shape == (3, 32, 4)
    assert float(x.min()) == -0.5 and float(x.max()) == 1 and abs(float(labels.mean())) < 0.2
    assert not torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])
    alone, _ = rule.noise(linear, torch.tensor([7]), torch.tensor([2]))
    assert torch.equal(alone[0], x[2])
    assert not torch.equal(StaleInversion(seed=1).noise(linear, torch.tensor([7]), torch.tensor([2]))[1][0], labels[2])


def test_inputs_stay_in_the_box(linear):
    rule, three = StaleInversion(steps=1, box=(0, 0.1)), torch.arange(3)
    start, delta = updates(linear)
    x, *_ = rule.invert(linear, start, delta, *rule.noise(linear, three, three), torch.full((3, 1), 0.3).double(), 10)
    assert float(x.min()) >= 0 and float(x.max()) <= 0.1


@given(st.integers(1, 300), st.sampled_from([0.05, 0.3, 1.0]))
def test_the_mask_keeps_exactly_the_largest_entries(size, keep):
    delta = torch.stack([randn(size), torch.ones(size, dtype=torch.float64)])  # the second is all ties
    mask = largest(delta, keep)
    assert mask.sum(1).tolist() == [math.ceil(keep * size)] * 2 and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert float(delta[0].abs()[mask[0] == 1].min()) >= float(delta[0].abs()[mask[0] == 0].max() if keep < 1 and size > 1 else 0)


def test_only_large_models_are_matched_in_part(linear):
    start, delta = updates(linear, 1)
    x, labels = torch.zeros(1, 2, 8).double(), torch.zeros(1, 2, 4).double()
    rate = torch.zeros(1, 1).double()  # the synthetic client goes nowhere, so that the cost is |mask o delta|
    for dense, kept in ((36, 36), (35, 2)):
        _, _, cost = StaleInversion(dense=dense, steps=1).invert(linear, start, delta, x, labels, rate, 0)
        close(cost[0, 0], delta.abs().sort(descending=True).values[0, :kept].sum())


# ---- nothing stale, or nothing to be gained


@pytest.mark.parametrize("weights", ["samples", "uniform"])
@pytest.mark.parametrize("rule", [FirstOrder, StaleInversion])
def test_fresh_updates_are_fedavg_s_bit_for_bit(digits, follow, rule, weights):
    ours = follow(digits, rule(lr=0.3, **FULL, weights=weights), 3, cohort=4)
    plain = follow(digits, FedAvg(lr=0.3, **FULL, weights=weights), 3, cohort=4)
    assert all(torch.equal(a.x, b.x) for a, b in zip(ours, plain, strict=True))
    if rule is StaleInversion:
        assert int(ours[-1].state["inversions"]) == 0


def test_bytes_are_fedavg_s(slow):
    bytes_of = {
        type(rule): [(r["bytes_down"], r["bytes_up"]) for r in delayed(slow, rule, 5).history]
        for rule in (StaleInversion(n_it=1), FirstOrder(**FULL), FedAvg(**FULL))
    }
    assert bytes_of[StaleInversion] == bytes_of[FirstOrder] == bytes_of[FedAvg]


def test_taken_as_they_are_stale_updates_make_fedavg(slow):
    ours, plain = (delayed(slow, rule, 8) for rule in (FirstOrder(lam=0, lr=0.3, **FULL), FedAvg(lr=0.3, **FULL)))
    for name, values in plain.weights.items():
        close(ours.weights[name], values)


def test_switched_off_it_is_direct_aggregation_bit_for_bit(linear):
    rule, x = StaleInversion(lr=0.3, steps=1, n_it=100, n_rec=4), randn(36)
    reply = replied(linear, updates(linear, 4, start=x)[1], [2, 9, 9, 5], x, scale=torch.tensor([0.5, 1, 1, 2]).double(), total=3.0)
    off = rule.init(linear) | {"x": x, "switch": torch.tensor([0, 9])}
    direct = FirstOrder(lam=0).step({"x": x}, reply, 9)
    found = rule.step(off, reply, 9)
    assert torch.equal(found["x"], direct["x"]) and int(found["inversions"]) == 0
    assert not torch.equal(rule.step(off | {"switch": torch.tensor([-1, 9])}, reply, 9)["x"], direct["x"])


def test_first_order_by_its_formula(linear):
    w, old, delta = randn(36), randn(36, seed=1), randn(2, 36, seed=2)
    reply = replied(linear, delta, [5, 3], old)
    reply.starts[5] = {"x": w}
    hat = delta[1] - 4 * delta[1] * delta[1] * (w - old)
    close(FirstOrder().step({"x": w}, reply, 5)["x"], w + (delta[0] + hat) / 2)


# ---- which updates are inverted, and what becomes of them


def test_unique_is_farther_than_the_fresh_ones_are_from_one_another():
    fresh = torch.tensor([[1, 0.1, 0], [1, -0.1, 0], [1, 0, 0.1]])
    delta = torch.cat([fresh, 5 * fresh[:1], torch.tensor([[0.0, 0, -1], [-1, 0, 0]])])
    assert unique(delta, torch.arange(6) < 3)[3:].tolist() == [False, True, True]


@pytest.mark.parametrize(("degrees", "far"), [(15, False), (18, False), (19, True)])
def test_the_threshold_is_the_mean_and_a_standard_deviation(degrees, far):
    """Fresh updates at 0, 10 and 20 degrees are 1 - cos 10, 1 - cos 10 and 1 - cos 20 apart: mean 0.0302, deviation 0.0213, so
    the threshold is reached between 18 and 19 degrees from the nearest.
    """
    angle = torch.deg2rad(torch.tensor([0.0, 10, 20, 20 + degrees], dtype=torch.float64))
    assert bool(unique(torch.stack([angle.cos(), angle.sin()], 1), torch.arange(4) < 3)[3]) is far


def test_with_fewer_than_two_fresh_updates_all_are_unique():
    assert unique(torch.ones(3, 2), torch.tensor([True, False, False])).all()
    assert unique(torch.ones(3, 2), torch.zeros(3, dtype=torch.bool)).all()


def test_unique_stale_updates_are_converted_and_counted(linear):
    """Two stale updates of four point elsewhere, and only these change; the step is the mean of what is then there."""
    rule, x = StaleInversion(lr=0.3, steps=1, n_it=30, n_rec=4), randn(36)
    _, (one, other, near, *_) = updates(linear, 5)
    fresh = near + 0.1 * near.norm() / 6 * randn(3, 36)
    delta = torch.stack([*fresh, one, near, other])
    state = rule.init(linear) | {"x": x}
    found = rule.step(state, replied(linear, delta, [9, 9, 9, 4, 6, 4], x), 9)
    assert int(found["inversions"]) == 2 and found["past.client"].tolist() == [3, 5, 3, 5]
    assert found["past.version"].tolist() == [9, 9, 10, 10]
    hat = torch.cat([fresh, found["past.hat"][:1], near[None], found["past.hat"][1:2]])
    close(found["x"], x + hat.mean(0))
    assert torch.equal(found["past.raw"], torch.stack([one, other, one, other]))
    assert not torch.allclose(hat[3], one, atol=1e-3)
    assert not any(name.startswith("rec") for name in found)


def test_half_trusted_they_are_blended(linear):
    rule, x, delta = StaleInversion(lr=0.3, steps=1, n_it=30, n_rec=4), randn(36), updates(linear, 1)[1]
    full, half = (
        rule.step(rule.init(linear) | {"x": x, "switch": torch.tensor(switch)}, replied(linear, delta, [4], x), 9)
        for switch in ([-1, 1], [4, 10])
    )
    close(half["x"] - x, (full["x"] - x + delta[0]) / 2)


@pytest.mark.parametrize(("model", "small"), [(math.nan, 1.0), (0.0, 1e-4)])
def test_an_update_that_is_not_explained_stays_raw(linear, model, small):
    """Costs that are not numbers, and noise that costs more than nothing at a rate that leaves it where it is."""
    rule, x, delta = StaleInversion(lr=0.3, steps=1, n_it=3, rate=1e-12), randn(36), small * updates(linear, 1)[1]
    old = torch.full((36,), model, dtype=torch.float64)
    found = rule.step(rule.init(linear) | {"x": x}, replied(linear, delta, [4], old), 9)
    assert torch.equal(found["x"], x + delta[0]) and len(found["past.client"]) == 0 and int(found["inversions"]) == 1


def test_the_best_data_on_the_way_are_taken(linear):
    """A search that begins at the solution, as a warm one may, and is led away from it by far too high a rate."""
    rule, truth = StaleInversion(steps=1, rate=10.0), (randn(1, 4, 8), randn(1, 4, 4))
    start, rate = randn(1, 36), torch.full((1, 1), 0.1, dtype=torch.float64)
    delta = local_update(linear, start, truth[0], truth[1].softmax(-1), 0.1, 1) - start + 1e-9 * randn(36, seed=7)
    x, labels, cost = rule.invert(linear, start, delta, *truth, rate, 3)
    assert torch.equal(x, truth[0]) and torch.equal(labels, truth[1]) and float(cost[1]) < 1e-7 < float(cost[0])


def test_each_model_is_unrolled_at_its_own_rate(linear):
    """The search at the rate of the client's version, the conversions at those of this round and of the next."""
    truth, seen = (randn(1, 4, 8), randn(1, 4, 4)), []

    class Told(StaleInversion):
        abstract: ClassVar[bool] = True

        def invert(self, problem, start, delta, x, labels, rate, n_it):
            seen.append((start, float(rate), n_it))
            return *truth, torch.tensor([[1.0], [0.0]]).double()

    rule, x = Told(lr=exponential(0.4, 0.5), steps=2, n_rec=4), randn(36)
    found = rule.step(rule.init(linear) | {"x": x}, replied(linear, updates(linear, 1)[1], [1], randn(36, seed=5)), 3)
    assert seen[0][1:] == (0.2, 500) and torch.equal(seen[0][0][0], randn(36, seed=5))
    for w, version, lr in ((x, 3, 0.05), (found["x"], 4, 0.025)):
        hat = local_update(linear, w[None], truth[0], truth[1].softmax(-1), lr, 2) - w
        close(found["past.hat"][found["past.version"] == version], hat)
    close(found["x"], x + found["past.hat"][0])


# ---- back to raw updates


def remembered(rule, problem, x, hat, raw):
    """A server that has converted an update of client 3 in round 9."""
    past = {"client": torch.tensor([3]), "version": torch.tensor([9]), "hat": hat[None], "raw": raw[None]}
    return rule.init(problem) | {"x": x} | {f"past.{n}": t for n, t in past.items()}


@pytest.mark.parametrize(("better", "begun"), [("hat", False), ("raw", True)])
def test_the_true_update_decides_once_it_arrives(linear, better, begun):
    rule, truth = StaleInversion(steps=1, n_it=1), randn(36)
    near, far = truth + 0.1, truth - 1
    hat, raw = (near, far) if better == "hat" else (far, near)
    state = remembered(rule, linear, randn(36, seed=1), hat, raw)
    found = rule.step(state, replied(linear, truth[None], [9], state["x"], clients=[3]), 49)
    assert found["errors"].tolist() == [[49, *(pytest.approx(float((v - truth).norm())) for v in (hat, raw))]]
    assert found["switch"].tolist() == ([49, 20] if begun else [-1, 1])  # tau / 2 rounds for a tau of 40
    assert 9 not in found["past.version"]


@pytest.mark.parametrize(("client", "version", "waits"), [(3, 8, True), (3, 10, False), (2, 9, True)])
def test_only_an_update_from_that_model_is_compared(linear, client, version, waits):
    """Another client's, or an earlier one, changes nothing; after a later one the true update can no longer come."""
    rule, x = StaleInversion(steps=1, n_it=1), randn(36)
    state = remembered(rule, linear, x, x, x)
    found = rule.step(state, replied(linear, randn(1, 36, seed=1), [version], x, clients=[client]), 12)
    assert len(found["errors"]) == 0 and (9 in found["past.version"]) is waits


def test_old_comparisons_are_forgotten_and_the_switch_stays(linear):
    rule, x, truth = StaleInversion(steps=1, n_it=1), randn(36), randn(36, seed=1)
    state = remembered(rule, linear, x, truth, truth + 1)
    state |= {"errors": torch.tensor([[2.0, 9, 1], [3.0, 2, 1]]).double(), "switch": torch.tensor([5, 10])}
    found = rule.step(state, replied(linear, truth[None], [9], x, clients=[3]), 12)
    assert found["errors"][:, 0].tolist() == [3, 12] and found["switch"].tolist() == [5, 10]


def test_trust_falls_evenly_from_the_switch_on():
    assert [trust(torch.tensor([-1, 1]), t) for t in (0, 99)] == [1, 1]
    assert [trust(torch.tensor([20, 10]), t) for t in (20, 21, 25, 29, 30, 99)] == pytest.approx([1, 0.9, 0.5, 0.1, 0, 0])


def test_in_virtual_time_the_client_s_next_update_is_the_true_one(slow, heard):
    """A client that delivers in round t goes on from version t + 1, for which there is a conversion to compare with."""
    delayed(slow, Overheard(lr=0.3, n_it=30, n_rec=4, box=(0, 1)), 7)
    late = [(r, c, v) for r, reply in heard for c, v in zip(reply.clients.tolist(), reply.versions.tolist(), strict=True) if v < r]
    assert late == [(2, 0, 0), (2, 1, 0), (5, 0, 3), (5, 1, 3)]
    state = StaleInversion(lr=0.3, n_it=30, n_rec=4, box=(0, 1))
    nets = []
    delayed(slow, state, 7, on_start=nets.append)
    assert int(nets[0].state["inversions"]) == 4 and nets[0].state["errors"][:, 0].tolist() == [5, 5]


# ---- D_rec in memory, and runs that are resumed


class Stop:
    def start(self, net):
        self.net = net

    def write(self, record):
        self.net.stopping |= record["round"] == 4

    def close(self):
        pass


@pytest.mark.parametrize("warm", [None, 2])
def test_a_run_goes_on_identically_and_keeps_no_data_unless_asked(slow, tmp_path, warm):
    rule = StaleInversion(lr=0.3, n_it=30, n_rec=4, box=(0, 1), warm=warm)
    whole, stop = delayed(slow, rule, 9), Stop()
    delayed(slow, rule, 9, out=tmp_path, writers=[stop], on_start=stop.start)
    saved = Folder(tmp_path).load()
    assert len(saved["state.past.client"]) == 4
    assert {n for n in saved if "rec" in n} == (set() if warm is None else {f"state.rec.{n}" for n in ("client", "labels", "x")})
    rest = hs.resume(tmp_path, slow)
    assert all(torch.equal(whole.weights[n], rest.weights[n]) for n in whole.weights)


def test_a_warm_search_begins_where_the_last_one_ended(linear):
    rule, x = StaleInversion(lr=0.3, steps=1, n_it=100, n_rec=4, warm=5), randn(36)
    start, delta = updates(linear, 1)
    begin = rule.init(linear) | {"x": x}
    one = rule.step(begin, replied(linear, delta, [4], start[0]), 9)
    assert one["rec.client"].tolist() == [0]
    two = rule.step(one, replied(linear, 0.8 * delta, [5], start[0]), 10)
    rate = torch.full((1, 1), 0.3, dtype=torch.float64)
    again, labels, _ = rule.invert(linear, start, 0.8 * delta, one["rec.x"], one["rec.labels"], rate, 5)
    assert torch.equal(two["rec.x"], again) and torch.equal(two["rec.labels"], labels) and len(two["rec.client"]) == 1


# ---- what is refused


def refused(match, **how):
    with pytest.raises(hs.ConfigError, match=match):
        how.pop("rule", StaleInversion()).init(how.pop("problem"))


def test_problems_that_cannot_be_inverted_are_refused(quadratics):
    sample = torch.zeros(1, 8)
    refused("private parameters", problem=hs.Federation(hs.tasks.digits(), 5, private=("2.*",)).problem)
    refused("batch norm", problem=Problem(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)), sample=sample))
    refused("not real numbers", problem=hs.Federation(hs.tasks.text(), 5).problem)
    refused("not real numbers", problem=Problem(nn.Linear(8, 4)))
    refused("other than cross-entropy", problem=Problem(nn.Linear(8, 4), squared_error, sample=sample))
    refused("other than cross-entropy", problem=quadratics.problem)
    refused("more than one label", problem=Problem(nn.Linear(8, 4), sample=torch.zeros(1, 3, 8)))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"clip": 1.0}, "StaleInversion.clip"),
        ({"local": "sgd(momentum=0.9)"}, "plain sgd"),
        ({"steps": None}, "StaleInversion.steps"),
        ({"box": (1, 0)}, r"StaleInversion.box: \(1.*least value comes first"),
        ({"keep": 0}, "StaleInversion.keep"),
    ],
)
def test_settings_under_which_the_unroll_is_not_the_clients_work_are_refused(wrong, match):
    with pytest.raises(hs.ConfigError, match=match):
        StaleInversion(**wrong)
