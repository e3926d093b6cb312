"""Clients that start from different versions, in different rounds, side by side: each does what it does alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_clients import chain, context, plain, plainly, samples_of
from torch import Tensor, nn

import hanse as hs
from hanse.core.context import Context
from hanse.core.gradients import paths
from hanse.core.messages import Tensors, Upload
from hanse.core.problem import Problem
from hanse.core.samples import Batch, Samples
from hanse.methods import FedAvg

COUNTS = [11, 8, 8, 3, 1]
STEPS = torch.tensor([7, 5, 5, 2, 1])
ROUNDS = torch.tensor([4, 0, 9, 4, 2])
RATES = torch.tensor([0.3, 0.1, 0.2, 0.3, 0.05], dtype=torch.float64)[:, None]
RULES = [
    hs.methods.FedAvg(batch=4),
    hs.methods.FedAsync(batch=4, mu=0.5),
    hs.methods.FedProx(batch=4, mu=0.5),
    hs.methods.FedSpeed(batch=4, lam=1.0, alpha=0.7),
    hs.methods.Scaffold(batch=4),
    hs.methods.FedAvg_M(batch=4, steps=7, beta=0.3),
    hs.methods.FedAvg_M_VR(batch=4, steps=7, beta=0.3),
    hs.methods.Scaffold_M(batch=4, steps=7, beta=0.3),
    hs.methods.Scaffold_M_VR(batch=4, steps=7, beta=0.3),
]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def made(private: tuple[str, ...] = ()) -> tuple[Problem, Samples]:
    torch.manual_seed(0)
    problem = Problem(chain([6, 9, 4], [nn.ReLU]), metrics={}, dtype=torch.float64, private=private)
    return problem, samples_of(COUNTS, torch.randn(31, 6, dtype=torch.float64), torch.randint(4, (31,)))


def jobs(problem: Problem, rule: FedAvg) -> tuple[Tensors, Tensors]:
    """What five clients received, three versions in all, and what each has kept: ``[5, ...]``."""
    torch.manual_seed(1)
    version = torch.tensor([2, 0, 1, 2, 0])
    each = {n: t + 0.3 * torch.randn(3, *t.shape, dtype=torch.float64) for n, t in rule.message(rule.init(problem)).items()}
    if "gamma" in each:
        each["gamma"] = torch.tensor([[0.0], [0.4], [0.9]], dtype=torch.float64)  # the first version is that of round 0
    return (
        {n: t[version] for n, t in each.items()},
        {n: torch.randn(5, problem.shared, dtype=torch.float64) for n in rule.keeps},
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("path", ["loop", "vmap", "stacked"])
def test_a_mixed_batch_equals_each_client_alone(path: str, rule: FedAvg) -> None:
    problem, samples = made()
    message, kept = jobs(problem, rule)

    def work(ids: Tensor, message: Tensors, lr: float | Tensor) -> tuple[Context, Upload]:
        state = {n: t[ids] for n, t in kept.items()}
        way = paths(problem)[path]
        ctx = context(
            problem, way, samples, rule.plan(), ids=ids, rounds=ROUNDS[ids], steps=STEPS[ids], lr=lr, message=message, state=state
        )
        return ctx, rule.train(ctx)

    mixed, together = work(torch.arange(5), message, RATES)
    assert mixed.mixed
    for i in range(5):
        ctx, alone = work(torch.tensor([i]), {n: t[i] for n, t in message.items()}, float(RATES[i]))
        assert not ctx.mixed and together.sums.keys() == alone.sums.keys()
        for name, rows in together.sums.items():
            close(rows[i], alone.sums[name][0])
        for name, rows in mixed.state.items():
            close(rows[i], ctx.state[name][0])
        close(together.loss[i], alone.loss[0])
        close(together.weight[i], alone.weight[0])


def test_a_direction_sees_those_still_at_work_and_what_is_theirs() -> None:
    problem, samples = made()
    message, kept = jobs(problem, hs.methods.Scaffold())
    seen = []

    def look(ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        n = len(w)
        assert isinstance(ctx.lr, Tensor)
        per_client = [
            ctx.ids,
            ctx.rounds,
            ctx.steps,
            ctx.counts,
            ctx.lr,
            ctx.loss,
            ctx.buffers,
            *ctx.message.values(),
            *ctx.state.values(),
        ]
        assert {len(t) for t in per_client} == {n}
        assert torch.equal(ctx.rounds, ROUNDS[:n]) and torch.equal(ctx.lr, RATES[:n]) and torch.equal(ctx.start, message["x"][:n])
        seen.append(n)
        return ctx.grad(w, batch)

    way, plan, ids = paths(problem)["stacked"], FedAvg(batch=4).plan(), torch.arange(5)
    ctx = context(problem, way, samples, plan, ids=ids, rounds=ROUNDS, steps=STEPS, lr=RATES, message=message, state=kept)
    ctx.descend(look)
    assert seen == [5, 4, 3, 3, 3, 1, 1]


@pytest.mark.parametrize("buffers", ["average", "domain"])
def test_running_statistics_of_each_version_stay_apart(buffers: str) -> None:
    """A client starts from the statistics of its own version, and of its own domain."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    samples = samples_of([8, 6, 4], torch.randn(18, 6, dtype=torch.float64), torch.randint(4, (18,)))
    samples = replace(samples, domains=torch.tensor([1, 0, 1]))
    problem = Problem(model, metrics={}, dtype=torch.float64, buffers=buffers, domains=2)  # type: ignore[arg-type]
    start = problem.shared_buffers
    message = {"x": problem.start.repeat(3, 1), "buffers": start + torch.rand(3, *start.shape, dtype=torch.float64)}
    path, plan = paths(problem)["loop"], FedAvg(batch=4).plan()
    together = context(problem, path, samples, plan, ids=torch.arange(3), message=message)
    moved = together.displacement(plain)
    for i in range(3):
        alone = context(problem, path, samples, plan, ids=torch.tensor([i]), message={n: t[i] for n, t in message.items()})
        close(alone.displacement(plain)[0], moved[i])
        close(alone.buffers[0], together.buffers[i])


# ---- some of the clients


SOME = torch.tensor([True, False, True, False, True])


@pytest.mark.parametrize("mixed", [True, False])
def test_picked_clients_work_as_if_they_were_alone(mixed: bool) -> None:
    """Their batches, steps, rates, models, private rows and memory are their own, whoever was with them."""
    problem, samples = made(private=("2.*",))
    rule, ids = hs.methods.Scaffold(batch=4), torch.arange(5)
    message, kept = jobs(problem, rule)
    message = message if mixed else {n: t[0] for n, t in message.items()}
    kept["private"] = problem.start[problem.shared :] + torch.randn(5, problem.layout.size - problem.shared, dtype=torch.float64)

    def everyone() -> Context:
        state = {n: t.clone() for n, t in kept.items()}
        lr: float | Tensor = RATES if mixed else 0.1
        way = paths(problem)["stacked"]
        return context(problem, way, samples, rule.plan(), ids=ids, rounds=ROUNDS, steps=STEPS, lr=lr, message=message, state=state)

    whole, ctx = everyone(), everyone()
    expected = rule.train(whole)
    part = ctx.pick(SOME)
    found = rule.train(part)
    assert torch.equal(part.ids, ids[SOME]) and torch.equal(part.counts, whole.counts[SOME])
    for name, rows in expected.sums.items():
        close(found.sums[name], rows[SOME])
    for name, rows in whole.state.items():
        close(part.state[name], rows[SOME])
    close(found.loss, expected.loss[SOME])
    assert all(torch.equal(ctx.state[n], t) for n, t in kept.items()) and not bool(ctx.loss.any())  # nothing is written back


def test_nobody_can_be_picked() -> None:
    problem, samples = made()
    ctx = context(problem, paths(problem)["stacked"], samples, FedAvg().plan(), ids=torch.arange(5))
    assert ctx.pick(torch.zeros(5).bool()).displacement(plain).shape == (0, problem.shared)


# ---- gradients over many samples


@pytest.mark.parametrize("path", ["loop", "vmap", "stacked"])
def test_the_large_gradient_is_that_of_all_samples(path: str) -> None:
    """A batch that holds more than a client has is all it has."""
    problem, samples = made()
    torch.manual_seed(2)
    w = problem.start + torch.randn(5, problem.layout.size, dtype=torch.float64)
    expected = []
    for i, count in enumerate(COUNTS):
        x, y = samples.of(i)
        one = Batch(x[None], y[None], None, torch.tensor([i]), torch.zeros(1).long(), 0, 0)
        expected.append(plainly(problem, w[i : i + 1], one, [count])[0][0])
    for batch in (None, 11, 1000):
        ctx = context(problem, paths(problem)[path], samples, FedAvg(batch=2).plan(), ids=torch.arange(5))
        close(ctx.large_gradient(w, batch), torch.stack(expected))


class Seen:
    """A gradient path that only notes which samples it was asked about."""

    name, descend = "loop", None

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append(batch)
        return torch.zeros_like(w), torch.zeros(len(w), dtype=w.dtype)


def test_samples_of_a_large_gradient_are_the_clients_own_each_once_and_new_in_every_round() -> None:
    problem, _ = made()
    x = torch.arange(31, dtype=torch.float64)[:, None].expand(-1, 6)
    samples, seen = samples_of(COUNTS, x, torch.zeros(31).long()), Seen()
    for round in (0, 1):
        context(problem, seen, samples, FedAvg().plan(), ids=torch.arange(5), rounds=round).large_gradient(problem.start[None], 6)
    drawn = []
    for batch in seen.batches:
        assert batch.weight is not None
        drawn.append([batch.x[i, batch.weight[i] > 0, 0].long().tolist() for i in range(5)])
    for each in drawn:
        for i, numbers in enumerate(each):
            assert len(numbers) == len(set(numbers)) == min(6, COUNTS[i])
            assert all(samples.offsets[i] <= n < samples.offsets[i + 1] for n in numbers)
    assert sorted(drawn[0][0]) != sorted(drawn[1][0])
