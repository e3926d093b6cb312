"""bfloat16 arithmetic with full-precision weights."""

import copy

import pytest
import torch
from small_clients import batch_of, chain, context, plain, samples_of
from torch import Tensor, nn

from hanse.core.gradients import Loop, paths
from hanse.core.losses import cross_entropy
from hanse.core.problem import Problem
from hanse.core.samples import Plan


@pytest.fixture
def problem() -> Problem:
    torch.manual_seed(0)
    return Problem(chain([16, 32, 4], [nn.Tanh]), metrics={})


def data(n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 16), torch.randint(4, (n,))


@pytest.mark.parametrize("name", ["loop", "vmap"])
def test_close_to_full_precision_and_not_the_same(problem: Problem, name: str) -> None:
    counts = [8, 5]
    batch, w = batch_of(counts, *data(16)), problem.start.expand(2, -1).clone()
    none = problem.start_buffers.expand(2, -1)
    full, half = (paths(problem, bf16)[name].grad(w, batch, none)[0] for bf16 in (False, True))
    assert half.dtype == torch.float32
    error = float((half - full).norm() / full.norm())
    assert 1e-4 < error < 2e-2


def test_no_stacked_path_in_bfloat16(problem: Problem) -> None:
    assert set(paths(problem, bf16=True)) == {"loop", "vmap"}


def by_hand(problem: Problem, x: Tensor, y: Tensor, steps: int, lr: float) -> Tensor:
    """Full-batch gradient descent with autocast entered anew in every step."""
    model = copy.deepcopy(problem.model)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        grads = torch.autograd.grad(cross_entropy(output.float(), y).mean(), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.sub_(g, alpha=lr)
    return problem.layout.flatten(dict(model.named_parameters())) - problem.start


@pytest.mark.parametrize("name", ["loop", "vmap"])
def test_weights_are_cast_anew_in_every_step(problem: Problem, name: str) -> None:
    """Autocast remembers cast weights until it is left; a step that saw the last step's weights would stay where it is."""
    x, y = data(8)
    path = paths(problem, bf16=True)[name]
    moved = context(problem, path, samples_of([8], x, y), Plan(batch=8, steps=5, shuffle=False), lr=0.5).displacement(plain)[0]
    expected = by_hand(problem, x, y, 5, 0.5)
    assert float((moved - expected).norm() / expected.norm()) < (1e-6 if name == "loop" else 1e-2)
    stale = 5 * by_hand(problem, x, y, 1, 0.5)
    assert float((moved - stale).norm() / expected.norm()) > 5e-2


def test_loop_leaves_no_autocast_behind(problem: Problem) -> None:
    Loop(problem, bf16=True).grad(problem.start[None], batch_of([4], *data(4)), problem.start_buffers[None])
    assert not torch.is_autocast_enabled("cpu")
