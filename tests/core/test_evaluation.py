"""Evaluation of every client: one model for all, or a row a client, equals one client at a time."""

import torch
from small_clients import samples_of
from torch import nn

from hanse.core.problem import Problem


def test_own_models_in_batches_equal_one_client_at_a_time() -> None:
    problem = Problem(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)), dtype=torch.float64)
    counts = [3, 0, 700, 1, 40]
    x, y = torch.randn(sum(counts), 6, dtype=torch.float64), torch.randint(4, (sum(counts),))
    samples = samples_of(counts, x, y)
    w = problem.start + torch.randn(len(counts), problem.layout.size, dtype=torch.float64)
    buffers = problem.start_buffers + torch.rand(len(counts), problem.buffer_layout.size, dtype=torch.float64)
    found = problem.evaluate_clients(w, buffers, samples)
    for name in ("loss", "accuracy"):
        alone = [problem.evaluate(w[c], buffers[c], *samples.of(c))[name] for c in range(len(counts)) if counts[c]]
        torch.testing.assert_close(found[name][torch.tensor([0, 2, 3, 4])], torch.tensor(alone, dtype=torch.float64))
        assert found[name][1].isnan()


def test_outputs_are_those_of_every_model_on_its_own_samples_also_under_another_axis() -> None:
    problem = Problem(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), frozen=("0.*",), dtype=torch.float64)
    w, x = torch.randn(3, 2, problem.layout.size, dtype=torch.float64), torch.randn(3, 7, 6, dtype=torch.float64)
    none = problem.start_buffers.expand(3, -1)
    found = torch.vmap(lambda w: problem.outputs(w, none, x), in_dims=1, out_dims=1)(w)
    assert found.shape == (3, 2, 7, 4)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(found[i, j], problem.output(w[i, j], problem.start_buffers, x[i]))
    torch.testing.assert_close(problem.outputs(w[:, 1], none, x), found[:, 1])
