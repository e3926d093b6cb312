"""Small federations in float64, and the network of a run without the run."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import hanse as hs
from hanse.core.messages import Reply
from hanse.engines.local import LocalNetwork


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
) -> LocalNetwork:
    """The network of a run in one fixed arrangement, unless ``engine`` says otherwise."""
    how = {"path": "loop", "chunk": 4, "workers": 1, "threads": 1, **engine}
    return LocalNetwork(
        federation,
        rule or hs.methods.FedAvg(),
        hs.engines.local(**how),
        codec or hs.codecs.identity(),
        seed=seed,
        rounds=100,
        on_commit=lambda net: None,
    )


def ask(net: LocalNetwork, ids: Tensor, message: dict[str, Tensor] | None = None) -> Reply:
    """One exchange, outside any schedule."""
    coroutine = net.ask(ids, "train", message or net.method.message(net.begin(net.method.init(net.problem))[0]))
    try:
        coroutine.send(None)
    except StopIteration as end:
        reply: Reply = end.value
        return reply
    raise AssertionError("the local engine answers at once")


def rounds(net: LocalNetwork, n: int, cohort: int = 5) -> dict[str, Tensor]:
    """``n`` rounds of the synchronous schedule; returns the server's state."""
    state, _ = net.begin(net.method.init(net.problem))
    for _ in range(n):
        t, ids = net.round, net.sample(cohort)
        state = net.method.step(state, ask(net, ids, net.method.message(state)), t)
        done = net.commit(state)
        with pytest.raises(StopIteration):
            done.send(None)
    return state


def traffic(net: LocalNetwork) -> tuple[int, int]:
    """Bytes down and up so far."""
    return net.clock.down, net.clock.up


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit; NaN equals NaN."""
    return one.keys() == other.keys() and all(torch.equal(one[n].nan_to_num(-1), other[n].nan_to_num(-1)) for n in one)
