"""What the experiments share: the form of their findings, how these are written down, and runs over several seeds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from hanse.core.errors import CheckpointError, DivergedError
from hanse.data.partition import Partition, natural
from hanse.data.tasks import digits, quadratics
from hanse.engines.local import LocalNetwork, local
from hanse.experiment import run
from hanse.federation import Federation
from hanse.methods.base import Method
from hanse.schedules.network import Schedule
from hanse.schedules.synchronous import synchronous
from hanse.track.run import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Property:
    """One claim, and what was measured of it."""

    name: str
    claim: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Findings:
    """What came out of one experiment: ``setting`` says how it was made, ``rows`` under ``columns`` are its numbers."""

    title: str
    setting: str
    properties: Sequence[Property]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figure: Figure

    @property
    def hold(self) -> bool:
        """Whether every property holds."""
        return all(p.holds for p in self.properties)


def _claims(findings: Findings) -> list[list[str]]:
    return [[p.name, p.claim, p.measured, "yes" if p.holds else "no"] for p in findings.properties]


CLAIM_COLUMNS = ("property", "claim", "measured", "holds")


def tables(findings: Findings) -> list[Table]:
    """The properties, and the numbers behind them."""
    found = []
    for title, columns, rows in (
        (findings.title, CLAIM_COLUMNS, _claims(findings)),
        ("Measurements", findings.columns, findings.rows),
    ):
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        found.append(table)
    return found


def save(findings: Findings, folder: Path) -> None:
    """Write ``result.json``, ``report.md`` and ``figure.png``; raises ``CheckpointError`` when the folder cannot be written."""
    text = [f"# {findings.title}", "", findings.setting, ""]
    for columns, rows in ((CLAIM_COLUMNS, _claims(findings)), (findings.columns, findings.rows)):
        text += ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)] + [""]
    text += [f"![{findings.title}](figure.png)", ""]
    result = {
        "title": findings.title,
        "setting": findings.setting,
        "holds": findings.hold,
        "properties": [vars(p) for p in findings.properties],
        "measurements": [dict(zip(findings.columns, row, strict=True)) for row in findings.rows],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(result, indent=1))
        (folder / "report.md").write_text("\n".join(text))
        findings.figure.savefig(folder / "figure.png", dpi=150)
    except OSError as error:
        raise CheckpointError(f"out: {folder} cannot be written: {error.strerror}") from None


class Scored(NamedTuple):
    """One run as it went, float64 each: virtual seconds and client updates so far, and the score then; ends where it diverged."""

    seconds: Tensor
    updates: Tensor
    score: Tensor

    def at(self, seconds: Tensor) -> Tensor:
        """The score that held at each of ``seconds``; NaN before the first."""
        place = torch.searchsorted(self.seconds, seconds, right=True) - 1
        return torch.where(place >= 0, self.score[place.clamp(min=0)], torch.nan)


class _Watcher:
    """A writer that scores the global model after every so many rounds."""

    def __init__(self, score: Callable[[LocalNetwork], float], every: int) -> None:
        self.score, self.every, self.found = score, every, list[tuple[float, float, float]]()
        self.net: LocalNetwork | None = None

    def start(self, net: LocalNetwork) -> None:
        self.net = net

    def write(self, record: Record) -> None:
        assert self.net is not None
        if record["round"] % self.every == 0:
            self.found.append((record["seconds"], float(record["updates"]), self.score(self.net)))

    def close(self) -> None:
        pass


def train_loss(net: LocalNetwork) -> float:
    """Mean loss of the global model over the training samples of all clients."""
    return net.problem.evaluate(net.state["x"], net.problem.start_buffers, net.samples.x, net.samples.y)["loss"]


def test_accuracy(net: LocalNetwork) -> float:
    """Accuracy of the global model on the test set."""
    split = net.federation.split
    return net.problem.evaluate(net.state["x"], net.problem.start_buffers, split.test_x, split.test_y)["accuracy"]


def digit_federations(clients: int, partition: Partition) -> list[Federation]:
    """The digits, split over ``clients`` clients anew for every seed."""
    return [Federation(digits(), clients=clients, partition=partition, seed=seed) for seed in SEEDS]


def follow(
    federation: Federation,
    rule: Method,
    schedule: Schedule,
    score: Callable[[LocalNetwork], float],
    rounds: int,
    seconds: float | None = None,
    every: int = 1,
    chunk: int = 20,
) -> Scored:
    """``score`` after every ``every`` rounds of a run of ``rounds`` rounds or ``seconds`` virtual seconds."""
    # A fixed arrangement, so that the numbers do not depend on what a machine finds fastest.
    engine, watcher = local(path="stacked", chunk=chunk, workers=1, threads=1), _Watcher(score, every)
    with contextlib.suppress(DivergedError):
        run(
            federation,
            rule,
            schedule,
            rounds=rounds,
            seconds=seconds,
            evaluate=0,
            engine=engine,
            writers=[watcher],
            on_start=watcher.start,
        )
    return Scored(*torch.tensor(watcher.found, dtype=torch.float64).reshape(-1, 3).t().contiguous())


def scores(
    federations: Sequence[Federation], rule: Method, cohort: int, rounds: int, score: Callable[[LocalNetwork], float]
) -> Tensor:
    """``score`` after every synchronous round, float64 ``[federations, rounds]``; NaN from where a run diverged."""
    found = torch.full((len(federations), rounds), torch.nan, dtype=torch.float64)
    for row, federation in zip(found, federations, strict=True):
        values = follow(federation, rule, synchronous(cohort=cohort), score, rounds, chunk=cohort).score
        row[: len(values)] = values
    return found


def distance_to_optimum(rule: Method, cohort: int, rounds: int) -> float:
    """Distance from the minimiser of ten heterogeneous quadratics, one a client, after ``rounds`` rounds in float64."""
    task = quadratics()
    federation = Federation(task, clients=task.count, partition=natural(), dtype="float64")
    engine = local(path="vmap", chunk=cohort, workers=1, threads=1)
    nets: list[LocalNetwork] = []
    run(federation, rule, synchronous(cohort=cohort), rounds=rounds, evaluate=0, engine=engine, on_start=nets.append)
    return float((nets[0].state["x"] - task.optimum()).norm())
