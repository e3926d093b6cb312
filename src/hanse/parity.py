"""One short run in every engine that is installed: do they come to the same?"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from hanse.config import Parts, Settings
from hanse.engines import local, processes, ray
from hanse.experiment import run
from hanse.track.run import Run

SEEN_BY_ALL = ("round", "bytes_down", "bytes_up", "loss", "updates")
"""What of a record does not depend on whether time is virtual."""


class Verdict(NamedTuple):
    """How one engine's run compares with the first one's."""

    engine: str
    agrees: bool | None
    """None: it was not run."""
    seconds: float
    text: str


def parity(settings: Settings, rounds: int) -> list[Verdict]:
    """Run the first rule, schedule, codec and seed of ``settings`` for ``rounds`` rounds in every engine, and compare."""
    parts = settings.parts()
    ways = [fixed(settings, parts)] if parts.engine.path is None else [parts.engine.path]
    how: dict[str, Any] = {"path": ways[0], "chunk": 1, "workers": 2, "shards": 2, "threads": 1, "shortcuts": False}
    how["precision"] = parts.engine.precision
    runs: dict[str, Callable[[], Run]] = {
        "local": lambda: _run(settings, parts, local(**how), rounds),
        "processes": lambda: _run(settings, parts, processes(**how), rounds),
        "ray": lambda: _run(settings, parts, ray(**how, cpus=0.5), rounds),
    }
    first: Run | None = None
    found = []
    for name, go in runs.items():
        if name in ("ray", "flower") and find_spec({"flower": "flwr"}.get(name, name)) is None:
            found.append(Verdict(name, None, 0.0, f"not installed: pip install 'hanse[{name}]'"))
            continue
        began = time.monotonic()
        result = go()
        seconds = time.monotonic() - began
        first = first or result
        found.append(_judge(name, result, first, seconds))
    return found


def fixed(settings: Settings, parts: Parts) -> str:
    """The first way to compute gradients that the model allows."""
    from hanse.core.gradients import paths

    problem = settings.federation(settings.seed[0]).problem
    return next(iter(paths(problem, parts.engine.precision == "bf16"))) if parts.methods[0].batched else "loop"


def _run(settings: Settings, parts: Parts, engine: Any, rounds: int) -> Run:
    seed = settings.seed[0]
    return run(
        settings.federation(seed),
        parts.methods[0],
        parts.schedules[0],
        rounds=rounds,
        codec=parts.codecs[0],
        down=parts.down,
        privacy=parts.privacy,
        attack=parts.attack,
        engine=engine,
        seed=seed,
    )


def _judge(name: str, result: Run, first: Run, seconds: float) -> Verdict:
    ours, theirs = ([{n: v for n, v in r.items() if n in SEEN_BY_ALL} for r in run.history] for run in (result, first))
    unlike = [n for one, other in zip(ours, theirs, strict=True) for n in SEEN_BY_ALL if one[n] != other[n]]
    far = max(float((t - first.weights[n]).abs().max()) for n, t in result.weights.items())
    same = all(torch.equal(t, first.weights[n]) for n, t in result.weights.items())
    text = "histories and weights are the same bit for bit" if same and not unlike else ""
    if unlike:
        text = f"histories differ in {', '.join(dict.fromkeys(unlike))}; "
    if not same:
        text += f"weights differ by up to {far:.3g}"
    return Verdict(name, same and not unlike, seconds, text.rstrip("; "))
