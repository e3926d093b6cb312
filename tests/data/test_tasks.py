import pytest
import torch

from hanse.core.gradients import paths
from hanse.core.problem import Problem
from hanse.core.samples import Plan
from hanse.core.streams import Streams
from hanse.data.partition import iid, natural
from hanse.data.task import Task
from hanse.data.tasks import digits, quadratics, text


def problem_of(task: Task, dtype: torch.dtype = torch.float64) -> Problem:
    torch.manual_seed(0)
    return Problem(task.model(), task.loss, task.metrics, dtype=dtype)


def test_digits_are_the_real_ones_and_separable():
    task = digits()
    data = task.data(Streams(0))
    assert data.x.shape == (1437, 64) and data.test_x.shape == (360, 64)
    assert float(data.x.min()) == 0 and float(data.x.max()) == 1
    assert torch.bincount(torch.cat([data.y, data.test_y])).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    centres = torch.stack([data.x[data.y == c].mean(0) for c in range(10)])
    nearest = torch.cdist(data.test_x, centres).argmin(1)
    assert (nearest == data.test_y).double().mean() > 0.85
    assert task.model()(data.x[:3]).shape == (3, 10)
    assert not torch.equal(task.data(Streams(1)).y, data.y)


def test_quadratics_do_not_follow_the_runs_seed():
    assert torch.equal(quadratics().data(Streams(0)).x, quadratics().data(Streams(5)).x)
    assert not torch.equal(quadratics(seed=1).samples(), quadratics().samples())
    a, _ = quadratics().samples().unbind(1)
    assert a.shape == (10, 10) and 0.5 <= a.min() < 0.6 and 1.9 < a.max() <= 2


def test_the_optimum_of_the_quadratics_has_no_gradient():
    task = quadratics(count=7, dimension=3, seed=4)
    problem = problem_of(task)
    x = task.data(Streams(0)).x
    point = task.optimum().requires_grad_()
    problem.output(point, problem.start_buffers, x).mean().backward()
    assert point.grad.norm() < 1e-12
    assert (
        problem.output(problem.start, problem.start_buffers, x).mean()
        > problem.output(task.optimum(), problem.start_buffers, x).mean()
    )


def federated_averaging(task: quadratics, rate: float, steps: int, rounds: int) -> torch.Tensor:
    """FedAvg with full batches, written out with the batched gradients of the vmap path; returns the last model."""
    problem, streams = problem_of(task), Streams(0)
    samples = natural().split(task.data(streams), task.count, streams).train
    path, ids, w = paths(problem)["vmap"], torch.arange(task.count), problem.start
    for t in range(rounds):
        rows = w.expand(task.count, -1).clone()
        plan, rounds_of = Plan(batch=1, steps=steps), torch.full_like(ids, t)
        for _, batch in plan.batches(samples, ids, streams, rounds_of, torch.full_like(ids, steps)):
            gradient, _ = path.grad(rows, batch, problem.start_buffers.expand(task.count, -1))
            rows -= rate * gradient
        w = rows.mean(0)
    return w


def test_fedavg_stops_short_of_the_optimum_by_the_known_drift():
    task = quadratics()
    a, b = task.samples().unbind(1)
    weight = 1 - (1 - 0.1 * a) ** 10  # a client's 10 steps go this far towards its own minimum
    limit = (weight * b).sum(0) / weight.sum(0)
    assert float((limit - task.optimum()).norm()) == pytest.approx(0.280, abs=0.001)
    assert (federated_averaging(task, 0.1, 10, 20) - limit).norm() < 1e-6
    assert (federated_averaging(task, 0.5, 1, 30) - task.optimum()).norm() < 1e-9  # one step a round has no drift


def test_a_quadratic_is_a_client():
    task = quadratics()
    split = natural().split(task.data(Streams(0)), 10, Streams(0))
    assert torch.equal(split.train.x, task.samples()) and len(split.test.x) == 0
    assert torch.equal(split.test_x, task.samples())
    assert sorted(iid().split(task.data(Streams(0)), 10, Streams(0)).train.x[:, 0, 0].tolist()) == sorted(
        task.samples()[:, 0, 0].tolist()
    )


def test_text_windows_are_source_code_and_their_continuation():
    data = text(length=32).data(Streams(0))
    assert data.x.shape[1] == 32 and data.x.dtype == torch.int64
    assert torch.equal(data.x[:, 1:], data.y[:, :-1])
    assert len(data.names) >= 80 and {"asyncio", "json", "argparse"} <= set(data.owner_names)
    assert list(data.names) == sorted(data.names) and torch.equal(data.owner, data.group)
    one = data.x[data.owner == data.names.index("argparse")]
    assert "parser" in "".join(bytes(row.tolist()).decode(errors="replace") for row in one)
    assert len(data.test_x) == pytest.approx(len(data.x) / 9, rel=0.01)


def test_text_has_enough_natural_clients_with_enough_windows():
    split = natural().split(text().data(Streams(0)), 80, Streams(0))
    assert split.train.counts().min() > 50 and split.test.counts().min() > 10


def test_the_model_of_text_learns():
    torch.manual_seed(0)
    task = text(length=32, hidden=32)
    data, model = task.data(Streams(0)), task.model()
    x, y = data.x[:128], data.y[:128]
    letters = torch.bincount(y.flatten()).double()
    unigram = float(torch.special.entr(letters / letters.sum()).sum())
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(25):
        optimizer.zero_grad()
        loss = task.loss(model(x), y).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < unigram - 0.3
