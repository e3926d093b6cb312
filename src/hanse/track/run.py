"""A finished, or half-finished, run: what happened, and the weights it ended with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from torch import Tensor


class Record(TypedDict):
    """One committed round. Bytes and seconds are cumulative; ``metrics`` is empty in rounds without evaluation."""

    round: int
    seconds: float
    bytes_down: int
    bytes_up: int
    loss: float
    metrics: dict[str, float]
    cohort: list[int]


@dataclass
class Run:
    """One rule with one seed.

    ``settings`` are the resolved settings as text; ``weights`` the named tensors of the final model; ``clients`` one row a client:
    ``samples`` int64 ``[N]``, ``rounds`` int64 ``[N]`` (how often it took part), ``classes`` int64 ``[N, K]`` (training samples per
    class; absent for very many clients), ``accuracy`` float64 ``[N]`` (on its own test part, NaN without one; named by the
    task's first metric). ``names`` are the class names.
    """

    method: str
    seed: int
    settings: dict[str, str]
    history: list[Record]
    weights: dict[str, Tensor]
    clients: dict[str, Tensor] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
