"""FedSAM against its formula; that it is FedAvg where rho = 0 is shown among peers, in tests/schedules/test_gossip.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import hanse as hs
from hanse.core.gradients import Descend, GradientPath
from hanse.core.optim import sgd
from hanse.core.samples import Batch
from hanse.engines.simulation import Simulation
from hanse.methods import FedAvg, FedSAM

RHO, LR = 0.3, 0.1


@dataclass
class Heard:
    """A gradient path that keeps what it is asked and what it answers: points, batches, gradients."""

    inner: GradientPath
    calls: list[tuple[Tensor, Batch, Tensor]] = field(default_factory=list)
    name: str = "heard"
    descend: Descend | None = None

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        gradient, loss = self.inner.grad(w, batch, buffers)
        self.calls.append((w.clone(), batch, gradient.clone()))
        return gradient, loss


def trained(federation: hs.Federation, rule: FedAvg) -> tuple[Tensor, list[tuple[Tensor, Batch, Tensor]]]:
    """The model after a round with everybody, and every gradient that was computed in it."""
    heard: list[Heard] = []

    def listen(net: Simulation) -> None:
        heard.append(Heard(net.paths["vmap"]))
        net.paths["vmap"] = heard[0]

    everybody = hs.schedules.synchronous(cohort=federation.clients)
    engine = hs.engines.local("vmap", federation.clients, 1, 1, shortcuts=False)
    run = hs.run(federation, rule, everybody, rounds=1, evaluate=0, engine=engine, on_start=listen)
    return run.state["state.x"], heard[0].calls


def close(one: Tensor, other: Tensor, atol: float) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


def lengths(clients: int) -> Tensor:
    return torch.full((clients,), RHO, dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 4])
def test_on_quadratics_every_step_takes_the_gradient_a_length_rho_uphill(quadratics: hs.Federation, bowls: Any, steps: int) -> None:
    y = torch.zeros_like(bowls.b)
    for _ in range(steps):
        g = bowls.grad(y)
        y = y - LR * bowls.grad(y + RHO * g / g.norm(dim=1, keepdim=True))
    x, _ = trained(quadratics, FedSAM(lr=LR, rho=RHO, steps=steps))
    close(x, y.mean(0), 1e-6)


def test_both_passes_of_a_step_see_the_same_samples_and_other_steps_others(digits: hs.Federation) -> None:
    _, calls = trained(digits, FedSAM(steps=3, batch=4))
    assert len(calls) == 3 * FedSAM.gradients
    for (_, first, _), (_, second, _) in zip(calls[::2], calls[1::2], strict=True):
        assert torch.equal(first.x, second.x) and torch.equal(first.y, second.y)
    assert not torch.equal(calls[0][1].x, calls[2][1].x)


def test_delta_is_the_gradient_scaled_to_length_rho_over_all_tensors_together(digits: hs.Federation) -> None:
    """Norms of their own would make all tensors' parts equally long."""
    _, calls = trained(digits, FedSAM(steps=2, rho=RHO))
    for (y, _, g), (up, _, _) in zip(calls[::2], calls[1::2], strict=True):
        delta = up - y
        close(delta.norm(dim=1), lengths(6), 1e-6)
        close(delta * g.norm(dim=1, keepdim=True), RHO * g, 1e-9)
        parts = [t.flatten(1).norm(dim=1) for t in digits.problem.layout.views(delta).values()]
        assert bool((max(p.max() for p in parts) > 2 * torch.stack(parts).min(0).values).all())


def test_a_gradient_of_zero_has_no_direction() -> None:
    """A client at its minimum stays there."""
    quiet = hs.Federation(hs.tasks.quadratics(spread=1e-300), clients=10, partition=hs.natural(), dtype="float64")
    x, calls = trained(quiet, FedSAM(rho=RHO, steps=2))
    assert float(x.norm()) < 1e-200 and all(bool(w.isfinite().all()) for w, _, _ in calls)


def test_the_largest_norm_bounds_the_step_but_not_delta(quadratics: hs.Federation) -> None:
    x, ((y, _, _), (up, _, _)) = trained(quadratics, FedSAM(lr=LR, rho=RHO, steps=1, clip=1e-3))
    close((up - y).norm(dim=1), lengths(10), 1e-6)
    assert 0 < float(x.norm()) <= LR * 1e-3


def test_weight_decay_and_momentum_are_the_steps_not_deltas(digits: hs.Federation) -> None:
    """Written out from the gradients that were computed: ``m <- mu m + g + decay y``, ``y <- y - lr m``."""
    decay, mu = 0.1, 0.9
    x, calls = trained(digits, FedSAM(lr=LR, rho=RHO, steps=3, local=sgd(mu, decay), weights="uniform"))
    y, m = digits.problem.start.repeat(6, 1), torch.zeros(6, digits.problem.start.numel(), dtype=torch.float64)
    for (here, _, first), (up, _, second) in zip(calls[::2], calls[1::2], strict=True):
        close(here, y, 1e-12)
        close(up, y + RHO * first / first.norm(dim=1, keepdim=True), 1e-9)
        m = mu * m + second + decay * y
        y = y - LR * m
    close(x, y.mean(0), 1e-12)
