"""Small federations in float64, and the network of a run without the run."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

import hanse as hs
from hanse.core.messages import Reply
from hanse.engines.simulation import Simulation

T = TypeVar("T")


class normed(hs.tasks.digits):
    """Digits through batch norm."""

    abstract: ClassVar[bool] = True

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


class dropping(hs.tasks.digits):
    """Digits with dropout."""

    abstract: ClassVar[bool] = True

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 10))


def network(
    federation: hs.Federation,
    rule: hs.methods.Method | None = None,
    codec: hs.codecs.Codec | None = None,
    seed: int = 0,
    **engine: Any,
) -> Simulation:
    """The network of a run in one fixed arrangement, unless ``engine`` says otherwise."""
    how = {"path": "loop", "chunk": 4, "workers": 1, "threads": 1, **engine}
    return Simulation(
        federation,
        rule or hs.methods.FedAvg(),
        hs.engines.local(**how),
        codec or hs.codecs.identity(),
        seed=seed,
        rounds=100,
        on_commit=lambda net: None,
    )


def ask(net: Simulation, ids: Tensor, message: dict[str, Tensor] | None = None) -> Reply:
    """One exchange, outside any schedule."""
    return at_once(net.ask(ids, "train", message or net.method.message(net.begin(net.method.init(net.problem))[0])))


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What an awaitable of the local engine brings."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        found: T = end.value
        return found
    raise AssertionError("the local engine answers at once")


def rounds(net: Simulation, n: int, cohort: int = 5) -> dict[str, Tensor]:
    """``n`` rounds of the synchronous schedule; returns the server's state."""
    state, _ = net.begin(net.method.init(net.problem))
    for _ in range(n):
        t, ids = net.round, net.sample(cohort)
        state = net.method.step(state, ask(net, ids, net.method.message(state)), t)
        at_once(net.commit(state))
    return state


def traffic(net: Simulation) -> tuple[int, int]:
    """Bytes down and up so far."""
    return net.clock.down, net.clock.up


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit; NaN equals NaN."""
    return one.keys() == other.keys() and all(torch.equal(one[n].nan_to_num(-1), other[n].nan_to_num(-1)) for n in one)
