"""What the exact tests of the rules share: two small federations in float64, and a way to look at every round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import hanse as hs
from hanse.core.context import Context
from hanse.core.gradients import GradientPath
from hanse.core.samples import Batch
from hanse.engines.simulation import Simulation
from hanse.track.run import Record


class Parabola:
    """Gradients of the quadratics by their formula: limits take hundreds of rounds, which autograd would make slow."""

    name = "parabola"
    descend = None

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        a, b = batch.x[:, 0].unbind(1)
        miss = w - b
        return a * miss, 0.5 * (a * miss * miss).sum(1)


@dataclass
class Round:
    """What the server knew and the clients kept ``[N, P]`` after one round."""

    x: Tensor
    state: dict[str, Tensor]
    kept: dict[str, Tensor]
    record: Record


@dataclass
class Watcher:
    """Notes down every committed round; round -1 is the last one."""

    rounds: list[Round] = field(default_factory=list)
    net: Simulation | None = None

    def start(self, net: Simulation) -> None:
        self.net = net
        if isinstance(net.federation.task, hs.tasks.quadratics):
            net.paths["vmap"] = Parabola()

    def write(self, record: Record) -> None:
        assert self.net is not None
        kept = self.net.kept.read(torch.arange(self.net.clients)) if self.net.kept.widths else {}
        state = {n: t.clone() for n, t in self.net.state.items()}
        self.rounds.append(Round(state["x"], state, kept, record))

    def close(self) -> None:
        pass


Follow = Callable[..., list[Round]]
Draw = Literal["fixed", "bernoulli"]


@pytest.fixture
def follow() -> Follow:
    """``follow(federation, rule, rounds, cohort)``: every round of a run in one fixed arrangement, without shortcuts.

    The arrangement is fixed because sums taken in another order differ in their last bits; with it, equal formulas give equal bits.
    """

    def run(
        federation: hs.Federation,
        rule: hs.methods.Method,
        rounds: int,
        cohort: int | None = None,
        draw: Draw = "fixed",
        **engine: Any,
    ) -> list[Round]:
        cohort = cohort or federation.clients
        path = "vmap" if isinstance(federation.task, hs.tasks.quadratics) else "stacked"
        how = {"path": path, "chunk": cohort, "workers": 1, "threads": 1, "shortcuts": False} | engine
        watcher = Watcher()
        hs.run(
            federation,
            rule,
            hs.schedules.synchronous(cohort=cohort, draw=draw),
            rounds=rounds,
            evaluate=0,
            engine=hs.engines.local(**how),
            writers=[watcher],
            on_start=watcher.start,
        )
        return watcher.rounds

    return run


@dataclass
class Listening:
    """A gradient path that keeps every gradient it hands out."""

    inner: GradientPath
    heard: list[Tensor] = field(default_factory=list)

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        found = self.inner.grad(w, batch, buffers)
        self.heard.append(found[0].clone())
        return found


@pytest.fixture
def listen() -> Callable[[Context], list[Tensor]]:
    """``listen(ctx)``: the list to which every gradient computed for ``ctx`` from now on is added."""

    def attach(ctx: Context) -> list[Tensor]:
        ctx.path = Listening(ctx.path)
        return ctx.path.heard

    return attach


@pytest.fixture(scope="session")
def digits() -> hs.Federation:
    """Real digits on six unequal clients, float64."""
    return hs.Federation(hs.tasks.digits(hidden=8), clients=6, partition=hs.dirichlet(0.5), dtype="float64")


@pytest.fixture(scope="session")
def quadratics() -> hs.Federation:
    """Ten clients, each with one quadratic of its own: client i minimises 0.5 (x - b_i)^T A_i (x - b_i)."""
    return hs.Federation(hs.tasks.quadratics(), clients=10, partition=hs.natural(), dtype="float64")


@dataclass(frozen=True)
class Bowls:
    """The same quadratics as numbers: ``a`` (diagonals of A_i) and ``b`` ``[N, d]``, and ``best``, the minimiser of their mean."""

    a: Tensor
    b: Tensor
    best: Tensor

    def grad(self, x: Tensor) -> Tensor:
        """Every client's gradient at ``x`` ``[d]`` or ``[N, d]``."""
        return self.a * (x - self.b)

    def distance(self, x: Tensor) -> float:
        return float((x - self.best).norm())

    def fedavg_limit(self, lr: float, steps: int, mu: float = 0.0) -> Tensor:
        """Where FedAvg (FedProx with ``mu``) with full batches stops: the fixed point of its affine map, coordinate by coordinate.

        A client ends at z + r (x - z), with z = (a b + mu x) / (a + mu) and r = (1 - lr (a + mu))^steps.
        """
        r = (1 - lr * (self.a + mu)) ** steps
        s = (1 - r) / (self.a + mu)
        return (s * self.a * self.b).mean(0) / (1 - r - s * mu).mean(0)


@pytest.fixture(scope="session")
def bowls(quadratics: hs.Federation) -> Bowls:
    task = quadratics.task
    assert isinstance(task, hs.tasks.quadratics)
    a, b = task.samples().unbind(1)
    return Bowls(a, b, task.optimum())
