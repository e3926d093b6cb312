"""What the tests of gradients share: clients with random samples, a plain PyTorch gradient to compare with, and a way to work."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from hanse.core.context import Context
from hanse.core.gradients import GradientPath
from hanse.core.optim import Optimizer, sgd
from hanse.core.problem import Problem
from hanse.core.samples import Batch, Plan, Samples
from hanse.core.streams import Streams


def samples_of(counts: Sequence[int], x: Tensor, y: Tensor) -> Samples:
    """Clients with ``counts`` samples each, the first rows of ``x`` and ``y``."""
    return Samples(x, y, torch.tensor([0, *counts]).cumsum(0))


def batch_of(counts: Sequence[int], x: Tensor, y: Tensor, step: int = 0) -> Batch:
    """One batch ``[C, max(counts), ...]`` of clients with ``counts`` samples, padded with the first one."""
    clients, width = len(counts), max(counts)
    n = torch.tensor(counts)[:, None]
    real = torch.arange(width) < n
    x, y = (
        x[: clients * width].view(clients, width, *x.shape[1:]).clone(),
        y[: clients * width].view(clients, width, *y.shape[1:]).clone(),
    )
    for i, count in enumerate(counts):
        x[i, count:], y[i, count:] = x[i, 0], y[i, 0]
    weight = None if bool(real.all()) else (real.double() / n).to(x.dtype if x.is_floating_point() else torch.float64)
    return Batch(x, y, weight, torch.arange(10, 10 + clients), torch.full((clients,), 3), step, 0)


def plainly(problem: Problem, w: Tensor, batch: Batch, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What autograd says, one client at a time on its real samples alone: gradients ``[C, P]`` and losses ``[C]``."""
    gradients, losses, model = [], [], copy.deepcopy(problem.model).train()
    for row, x, y, count in zip(w, batch.x, batch.y, counts, strict=True):
        leaf = row.clone().requires_grad_()
        output = torch.func.functional_call(model, {**problem.layout.views(leaf), **problem.fixed}, (x[:count],))
        loss = problem.loss(output, y[:count]).mean()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
        losses.append(loss.detach())
    return torch.stack(gradients), torch.stack(losses)


def context(
    problem: Problem,
    path: GradientPath,
    samples: Samples,
    plan: Plan,
    *,
    ids: Tensor | None = None,
    rounds: Tensor | int = 0,
    steps: Tensor | None = None,
    lr: float | Tensor = 0.1,
    local: Optimizer | None = None,
    message: dict[str, Tensor] | None = None,
    state: dict[str, Tensor] | None = None,
    clip: float | None = None,
    totals: dict[str, Tensor] | None = None,
    seed: int = 0,
) -> Context:
    """The work of ``ids`` (default: all clients, longest first) in ``rounds``; a message with a row a client is a mixed one."""
    if ids is None:
        ids = (-plan.lengths(samples.counts())).argsort(stable=True)
    message = message or {"x": problem.start[: problem.shared].clone()}
    if problem.shares_buffers:
        message.setdefault("buffers", problem.start_buffers)
    return Context(
        problem=problem,
        path=path,
        samples=samples,
        streams=Streams(seed),
        ids=ids,
        rounds=torch.as_tensor(rounds).expand(len(ids)),
        steps=plan.lengths(samples.counts(ids)) if steps is None else steps,
        message=message,
        mixed=message["x"].dim() > 1,
        state=state or {},
        plan=plan,
        lr=lr,
        local=local or sgd(),
        clip=clip,
        totals=totals,
    )


def plain(ctx: Context, w: Tensor, batch: Batch) -> Tensor:
    """The direction of plain SGD."""
    return ctx.grad(w, batch)


def chain(widths: Sequence[int], activations: Sequence[type[nn.Module]], bias: bool = True) -> nn.Sequential:
    """Linear layers of the given widths with activations in between."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [*([activations[i - 1]()] if i else []), nn.Linear(a, b, bias)]
    return nn.Sequential(*layers)
