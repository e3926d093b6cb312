"""Cohorts to lie in: rows that every test can make, and a shorter way to have them forged."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from hanse.attacks import Attack, Forging
from hanse.core.layout import Layout
from hanse.core.streams import Streams


def rows(clients: int, size: int, seed: int = 0) -> Tensor:
    """Normal numbers, float64 ``[clients, size]``."""
    return Streams(seed).normal("rows", torch.arange(clients), 0, size)


def forging(ids: Tensor, size: int, *, name: str = "delta", rounds: Tensor | int = 3, seed: int = 0) -> Forging:
    rounds = torch.full_like(ids, rounds) if isinstance(rounds, int) else rounds
    return Forging(name, ids, rounds, Streams(seed), Layout({"w": (size,)}))


def forged(attack: Attack | str, values: Tensor, lies: Tensor, ids: Tensor | None = None, **more: object) -> Tensor:
    """What arrives of ``values`` ``[C, P]``; clients are numbered from 0 if ``ids`` does not say otherwise."""
    attack = Attack.parse(attack) if isinstance(attack, str) else attack
    ids = torch.arange(len(values)) if ids is None else ids
    return attack.forge(values, lies, forging(ids, values.shape[1], **more))


@st.composite
def cohorts(draw: st.DrawFn, honest: int = 0) -> tuple[Tensor, Tensor]:
    """``values`` ``[C, P]``, and who lies: at least one client, while at least ``honest`` do not."""
    lies = draw(st.lists(st.booleans(), min_size=max(1, honest), max_size=7))
    lies += [False] * (honest - lies.count(False)) + [True] * (not any(lies))
    return rows(len(lies), draw(st.integers(1, 9)), draw(st.integers(0, 99))), torch.tensor(lies)
