"""Bristle, what a peer does by itself: squash, trust, the F1 scores, the head of its own classes, and what it cannot train."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import Tensor, nn

import hanse as hs
from hanse.core.context import Context
from hanse.core.errors import ConfigError
from hanse.core.gradients import paths
from hanse.core.messages import Tensors
from hanse.core.optim import adaptive
from hanse.core.problem import Problem
from hanse.core.samples import Samples
from hanse.methods import Bristle, FedAvg
from hanse.methods.bristle import columns, f1_scores, familiar_classes, squash, trust
from hanse.schedules import synchronous

HEAD = ("0.*", "2.bias")
"""What is frozen of the digits' network, so that its output weight is left."""


def federation(clients: int = 6, **more: object) -> hs.Federation:
    more = {"partition": hs.neighbouring(each=10, test=0.5), "frozen": HEAD, "dtype": "float64", **more}
    return hs.Federation(hs.tasks.digits(hidden=24), clients, **more)  # type: ignore[arg-type]


def integrate(fed: hs.Federation, own: Tensor, candidates: Tensor, common: Tensor, valid: Tensor | None = None) -> Tensor:
    """What the first clients make of their ``own`` ``[C, P]`` and ``candidates`` ``[C, k, P]``."""
    valid = torch.ones_like(common, dtype=torch.bool) if valid is None else valid
    message: Tensors = {"x": own, "candidates": candidates, "common": common, "valid": valid}
    rule, ids = Bristle(), torch.arange(len(own))
    ctx = Context(
        problem=fed.problem,
        path=paths(fed.problem)["loop"],
        samples=fed.split.train,
        streams=fed.streams,
        ids=ids,
        rounds=torch.zeros_like(ids),
        steps=torch.ones_like(ids),
        message=message,
        mixed=True,
        state={},
        plan=rule.plan(),
        lr=0.1,
        local=rule.local,
        tests=fed.split.test,
    )
    return rule.integrate(ctx).rows["x"]


def skilled(fed: hs.Federation) -> Tensor:
    """Columns that mostly know the digits, ``[N, P]``: least squares on all samples, disturbed more from peer to peer."""
    x, y, fixed = fed.split.train.x, fed.split.train.y, fed.problem.fixed
    features = (x @ fixed["0.weight"].T + fixed["0.bias"]).relu()
    w: Tensor = (torch.linalg.pinv(features) @ (nn.functional.one_hot(y, 10).to(x) - fixed["2.bias"])).T.flatten()
    noise = torch.randn(fed.clients, len(w), generator=torch.Generator().manual_seed(0), dtype=w.dtype)
    return w + w.std() * noise * torch.linspace(0.01, 0.5, fed.clients)[:, None]


def centred(w: Tensor) -> Tensor:
    """``[..., 10 * 24]`` minus the mean of each column."""
    each = w.view(*w.shape[:-1], 10, 24)
    found: Tensor = (each - each.mean(-1, keepdim=True)).reshape(w.shape)
    return found


def test_squash_is_1_at_0_and_0_at_100_ln_two_thirds_and_at_most_6() -> None:
    ends = squash(torch.tensor([0.0, 100 * math.log(2 / 3), -torch.inf, torch.inf], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0, 0.0, 6.0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(squash(torch.tensor(-40.54)) < 1e-3) > 0 and float(squash(torch.tensor(-40.56))) == 0


@given(st.floats(-500, 500), st.floats(-500, 500))
def test_squash_never_falls(one: float, other: float) -> None:
    low, high = squash(torch.tensor(sorted([one, other]), dtype=torch.float64)).tolist()
    assert low <= high


@pytest.mark.parametrize(("own", "worst", "sign"), [(1.0, 0.2097, -1), (0.6, 0.2236, -1)])
def test_a_peer_that_is_worse_by_enough_counts_nothing(own: float, worst: float, sign: int) -> None:
    """``10 d > 40.5466^(1 / (4 + F))``."""
    assert pytest.approx(40.5466 ** (1 / (4 + own)) / 10, abs=1e-4) == worst
    familiar = torch.ones(1, 1, dtype=torch.bool)
    others = torch.tensor([[[own - worst + 1e-4], [own - worst - 2e-4]]], dtype=torch.float64)
    weights = trust(torch.full((1, 1), own, dtype=torch.float64), others, familiar, torch.ones(1, 2))
    assert 0 < float(weights[0, 0, 0]) < 1e-2 and float(weights[0, 1, 0]) == 0


def plainly(own: list[float], other: list[float], familiar: list[int], common: int) -> list[float]:
    """The paper's steps 3 to 8 for one peer, class by class."""
    if not common:
        return [0.0] * len(own)
    best = sorted(familiar, key=lambda c: -other[c])[:common]
    scores = {}
    for c in best:
        d = 10 * abs(other[c] - own[c])
        scores[c] = d ** (3 + own[c]) if other[c] > own[c] else -(d ** (4 + own[c]))
    mean = sum(other[c] for c in best) / common
    rho = max(0.0, mean - math.sqrt(sum((other[c] - mean) ** 2 for c in best) / common))

    def curve(s: float) -> float:
        return max(0.0, 10 / (1 + math.exp(min(-s / 100, 700))) - 4)

    of_foreign = rho * curve(sum(scores.values()))
    return [(rho * curve(max(-100, scores[c])) if c in scores else 0.0) if c in familiar else of_foreign for c in range(len(own))]


tenths = st.integers(0, 10).map(lambda n: n / 10)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_trust_is_the_papers_class_by_class(data: st.DataObject) -> None:
    own = data.draw(st.lists(tenths, min_size=5, max_size=5))
    others = data.draw(st.lists(st.lists(tenths, min_size=5, max_size=5), min_size=1, max_size=4))
    familiar = sorted(data.draw(st.sets(st.integers(0, 4), min_size=1)))
    common = [data.draw(st.integers(0, len(familiar))) for _ in others]
    flags = torch.zeros(1, 5, dtype=torch.bool).index_fill(1, torch.tensor(familiar), True)
    f, fs = (torch.tensor(values, dtype=torch.float64)[None] for values in (own, others))
    expected = [plainly(own, other, familiar, n) for other, n in zip(others, common, strict=True)]
    found = trust(f, fs, flags, torch.tensor([common]))[0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_f1_scores_are_those_of_scikit_learn_and_0_where_a_class_is_not_there() -> None:
    fed = federation()
    w = skilled(fed)
    models, clients = torch.stack([w[[3, 1]], w[[0, 4]]]), torch.tensor([2, 5])
    found = f1_scores(fed.problem, models, fed.split.test, clients, 10)
    for i, client in enumerate(clients.tolist()):
        x, y = fed.split.test.of(client)
        for j in range(2):
            answers = fed.problem.output(models[i, j], fed.problem.start_buffers, x).argmax(1)
            expected = f1_score(y, answers, labels=range(10), average=None, zero_division=0)
            torch.testing.assert_close(found[i, j], torch.from_numpy(expected))
    assert float(found.max()) > 0.3 and (found == 0).any()


def test_f1_scores_where_peers_have_different_numbers_of_test_samples_and_one_has_none() -> None:
    fed = federation(clients=3)
    x, y = fed.split.test.of(0)
    tests = Samples(x, y, torch.tensor([0, 3, 3, len(x)]))
    models = torch.randn(3, 2, fed.problem.layout.size, dtype=torch.float64)
    together = f1_scores(fed.problem, models, tests, torch.arange(3), 10)
    for i in range(3):
        torch.testing.assert_close(together[i], f1_scores(fed.problem, models[[i]], tests, torch.tensor([i]), 10)[0])
    assert (together[1] == 0).all()


def test_familiar_classes_are_those_of_ones_own_samples() -> None:
    y = torch.tensor([3, 3, 0, 1, 2])
    straight = Samples(torch.zeros(5, 1), y, torch.tensor([0, 2, 2, 5]))
    turned = Samples(torch.zeros(5, 1), y.flip(0), torch.tensor([0, 2, 2, 5]), torch.arange(5).flip(0))
    for samples in (straight, turned):
        found = familiar_classes(samples, torch.tensor([2, 0, 1]), 4)
        assert [row.nonzero().flatten().tolist() for row in found] == [[0, 1, 2], [3], []]


def test_a_peer_without_common_classes_has_no_effect() -> None:
    """The own columns come back bit for bit, but for the mean that every integration takes off."""
    fed = federation()
    w = skilled(fed)
    own, others = w[:2], w[2:6].view(2, 2, -1)
    assert torch.equal(integrate(fed, own, others, torch.zeros(2, 2)), centred(own))
    assert not torch.equal(integrate(fed, own, others, torch.full((2, 2), 4)), centred(own))
    nobody = torch.zeros(2, 2, dtype=torch.bool)
    assert torch.equal(integrate(fed, own, others, torch.full((2, 2), 4), nobody), centred(own))


def test_identical_models_change_nothing_but_the_mean_of_columns() -> None:
    fed = federation()
    own = skilled(fed)[:3]
    found = integrate(fed, own, own[:, None].expand(-1, 4, -1), torch.full((3, 4), 4))
    torch.testing.assert_close(found, centred(own), rtol=0, atol=1e-12)
    sums = found.view(3, 10, 24).sum(-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-12)


def test_columns_are_averaged_with_their_weights() -> None:
    fed = federation()
    w = skilled(fed)
    own, others, common = w[:2], torch.stack([w[2:5], w[3:6]]), torch.tensor([[2, 3, 0], [4, 1, 2]])
    scores = f1_scores(fed.problem, torch.cat([own[:, None], others], 1), fed.split.test, torch.arange(2), 10)
    a = trust(scores[:, 0], scores[:, 1:], familiar_classes(fed.split.train, torch.arange(2), 10), common)
    expected = own.view(2, 10, 24).clone()
    for i in range(2):
        for c in range(10):
            total = expected[i, c] + sum(a[i, j, c] * others[i, j].view(10, 24)[c] for j in range(3))
            expected[i, c] = total / (1 + a[i, :, c].sum())
    assert (a > 0).any() and (a == 0).any()
    torch.testing.assert_close(integrate(fed, own, others, common), centred(expected.flatten(1)), rtol=0, atol=1e-12)


def test_side_by_side_is_one_at_a_time() -> None:
    fed = federation()
    w = skilled(fed)
    others, common = w[torch.tensor([[1, 2], [2, 0], [5, 4]])], torch.tensor([[3, 2], [3, 2], [4, 1]])
    together = integrate(fed, w[:3], others, common)
    for i in range(3):
        alone = fed.split
        x = f1_scores(fed.problem, torch.cat([w[i : i + 1], others[i]])[None], alone.test, torch.tensor([i]), 10)
        a = trust(x[:, 0], x[:, 1:], familiar_classes(alone.train, torch.tensor([i]), 10), common[i : i + 1])[0, :, :, None]
        each = (w[i].view(10, 24) + (a * others[i].view(2, 10, 24)).sum(0)) / (1 + a.sum(0))
        torch.testing.assert_close(together[i], centred(each.flatten()), rtol=0, atol=1e-12)


def test_only_columns_of_familiar_classes_move() -> None:
    fed = federation()
    engine = hs.engines.local("vmap", 20, 1, 1)
    run = hs.run(fed, Bristle(steps=3), hs.schedules.bristle(topology="ring"), rounds=1, evaluate=0, engine=engine)
    alone = hs.run(federation(1), Bristle(steps=3), hs.schedules.bristle(), rounds=1, evaluate=0, engine=engine)
    moved = alone.state["state.x"].view(10, 24).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert run.state["state.familiar"].sum(1).tolist() == [4] * 6


def test_what_else_is_trained_has_to_be_frozen() -> None:
    with pytest.raises(ConfigError, match=r"frozen: 0.weight, 0.bias, 2.bias must be as well with Bristle, which trains 2.weight"):
        columns(federation(frozen=()).problem)
    with pytest.raises(ConfigError, match=r"frozen: 2.bias must be"):
        columns(federation(frozen=("0.*",)).problem)
    with pytest.raises(ConfigError, match=r"private: 2.weight is not allowed with Bristle"):
        columns(federation(private=("2.weight",)).problem)
    with pytest.raises(ConfigError, match=r"frozen: 1.running_mean, 1.running_var must be"):
        columns(
            Problem(
                nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False)), frozen=("0.*", "1.weight", "1.bias")
            )
        )


def test_what_is_refused() -> None:
    engine = hs.engines.local("vmap", 20, 1, 1)
    with pytest.raises(ConfigError, match=r"local: adamw is not allowed: it moves columns of foreign classes; set l2"):
        Bristle(local="adamw")
    with pytest.raises(ConfigError, match=r"server: adaptive is not allowed"):
        Bristle(server=adaptive())
    with pytest.raises(ConfigError, match=r"is not allowed with a server"):
        hs.run(federation(), Bristle(), synchronous(cohort=2), rounds=1, engine=engine)
    with pytest.raises(ConfigError, match=r"FedAvg is not allowed with bristle: it cannot integrate"):
        hs.run(federation(), FedAvg(), hs.schedules.bristle(), rounds=1, engine=engine)
    untested = federation(partition=hs.neighbouring(each=10, test=0))
    with pytest.raises(ConfigError, match=r"partition.test: 0 is not allowed with Bristle"):
        hs.run(untested, Bristle(), hs.schedules.bristle(), rounds=1, engine=engine)
    with pytest.raises(ConfigError, match=r"labels of type torch.float64"):
        familiar_classes(
            Samples(torch.zeros(1, 1), torch.zeros(1, dtype=torch.float64), torch.tensor([0, 1])), torch.tensor([0]), 2
        )
