"""One short run in every engine that is installed: do they come to the same?"""

from __future__ import annotations

import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hanse.config import Parts, Settings
from hanse.core.gradients import paths
from hanse.engines import flower, local, processes, ray
from hanse.experiment import run_settings
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


def parity(settings: Settings, rounds: int, clients: int) -> list[Verdict]:
    """Run the first rule, schedule, codec and seed of ``settings`` for ``rounds`` rounds in every engine, and compare.

    There are at most ``clients`` clients, each of which is a process of its own in a real federation, and nothing takes time.
    """
    one = {name: getattr(settings, name)[:1] for name in ("method", "schedule", "codec", "seed")}
    small = {"clients": min(settings.clients, clients), "rounds": rounds, "fleet": "ideal", "evaluate": 1, "seconds": None}
    settings = settings.model_copy(update={**one, **small, "evaluate_seconds": None, "track": (), "metrics_port": None})
    cohort = getattr(settings.parts().schedules[0], "cohort", None)
    if cohort is not None:
        settings = settings.model_copy(update={"cohort": min(cohort, settings.clients)})
    parts = settings.parts()
    path = parts.engine.path or first_path(settings, parts)
    how: dict[str, Any] = {"path": path, "shards": 2, "threads": 1, "precision": parts.engine.precision}
    alone = {**how, "chunk": 1, "workers": 2, "shortcuts": False}
    engines = {"local": local(**alone), "processes": processes(**alone), "ray": ray(**alone, cpus=0.5), "flower": flower(**how)}
    first: Run | None = None
    found = []
    for name, engine in engines.items():
        why = _why_not(name, settings, parts)
        if why:
            found.append(Verdict(name, None, 0.0, why))
            continue
        began = time.monotonic()
        own = settings.model_copy(update={"engine": engine.full()})
        result = _run_on_flower(own) if name == "flower" else run_settings(own)
        first = first or result
        found.append(_judge(name, result, first, time.monotonic() - began))
    return found


PACKAGES = {"ray": "ray", "flower": "flwr"}


def _why_not(engine: str, settings: Settings, parts: Parts) -> str:
    """Why a run is not made in an engine; empty where it is."""
    if engine in PACKAGES and find_spec(PACKAGES[engine]) is None:
        return f"not installed: pip install 'hanse[{engine}]'"
    if engine != "flower":
        return ""
    if settings.privacy or settings.attack:
        return "not compared: privacy and attacks are simulated"
    if parts.methods[0].masks or parts.methods[0].own_model or settings.buffers == "domain":
        return "not compared: the server would have to know more of single clients than they send there"
    if not parts.schedules[0].barrier:
        return f"not compared: who is first decides what {parts.schedules[0].short_name} does, and time is real there"
    return ""


def first_path(settings: Settings, parts: Parts) -> str:
    """The first way to compute gradients that rule and model allow."""
    problem = settings.federation(settings.seed[0]).problem
    return next(iter(paths(problem, parts.engine.precision == "bf16"))) if parts.methods[0].batched else "loop"


def _run_on_flower(settings: Settings) -> Run:
    from hanse.deploy.here import run

    with tempfile.TemporaryDirectory(prefix="hanse-parity-") as folder:
        return run(settings, Path(folder))


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
