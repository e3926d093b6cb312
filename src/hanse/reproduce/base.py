"""What the experiments share: the form of their findings, how these are written down, and runs over several seeds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from hanse.attacks import Attack
from hanse.codecs.base import Codec
from hanse.core.errors import CheckpointError, DivergedError
from hanse.data.partition import Partition, natural
from hanse.data.tasks import digits, quadratics
from hanse.engines.local import local
from hanse.engines.simulation import Simulation
from hanse.experiment import run
from hanse.federation import Federation
from hanse.fleet.profiles import Fleet
from hanse.methods.base import Method
from hanse.schedules.network import Schedule
from hanse.schedules.synchronous import synchronous
from hanse.track.run import Record, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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


def panels(width: float, *shares: float, height: float = 4) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, and its axes beside each other, which share the width as ``shares``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, len(shares), width_ratios=shares, squeeze=False)[0])


def band(ax: Axes, x: Sequence[float] | Tensor, runs: Tensor, colour: str, label: str) -> None:
    """Draw ``runs`` ``[seeds, X]`` over ``x`` ``[X]``: the mean over seeds as a line, from the lowest to the highest as a band."""
    ax.plot(x, runs.mean(0), color=colour, label=label)
    ax.fill_between(x, runs.min(0).values, runs.max(0).values, color=colour, alpha=0.18, lw=0)


def ticks(ax: Axes, at: Sequence[float]) -> None:
    """Number the horizontal axis at these places only, which a logarithmic one would not."""
    ax.set_xticks(at, [str(x) for x in at])
    ax.set_xticks([], minor=True)


def by_seed(values: Iterable[float]) -> str:
    """One number a seed, as a cell of a table."""
    return " ".join(f"{value:.3f}" for value in values)


def last_loss(losses: Tensor) -> float:
    """Mean over seeds of the loss after the last round, of ``[seeds, rounds]``; infinite if a run diverged."""
    return float(losses[:, -1].nan_to_num(torch.inf).mean())


class Scored(NamedTuple):
    """One run as it went, float64 each: virtual seconds and client updates so far, and the score then; ends where it diverged."""

    seconds: Tensor
    updates: Tensor
    score: Tensor

    def at(self, seconds: Tensor) -> Tensor:
        """The score that held at each of ``seconds``; NaN before the first."""
        place = torch.searchsorted(self.seconds, seconds, right=True) - 1
        return torch.where(place >= 0, self.score[place.clamp(min=0)], torch.nan)


class _Listener:
    """A writer that shows the network to ``look`` after every round."""

    def __init__(self, look: Callable[[Simulation], None]) -> None:
        self.look = look
        self.net: Simulation | None = None

    def start(self, net: Simulation) -> None:
        self.net = net

    def write(self, record: Record) -> None:
        assert self.net is not None
        self.look(self.net)

    def close(self) -> None:
        pass


def train_loss(net: Simulation) -> float:
    """Mean loss of the global model over the training samples of all clients."""
    return net.problem.evaluate(net.state["x"], net.problem.start_buffers, net.samples.x, net.samples.y)["loss"]


def test_accuracy(net: Simulation) -> float:
    """Accuracy of the global model on the test set."""
    split = net.federation.split
    return net.problem.evaluate(net.state["x"], net.problem.start_buffers, split.test_x, split.test_y)["accuracy"]


def digit_federations(clients: int, partition: Partition) -> list[Federation]:
    """The digits, split over ``clients`` clients anew for every seed."""
    return [Federation(digits(), clients=clients, partition=partition, seed=seed) for seed in SEEDS]


def watch(
    federation: Federation,
    rule: Method,
    schedule: Schedule,
    look: Callable[[Simulation], None],
    rounds: int,
    seconds: float | None = None,
    chunk: int = 20,
    codec: Codec | None = None,
    attack: Attack | None = None,
) -> Run:
    """A run of ``rounds`` rounds or ``seconds`` virtual seconds, whose network ``look`` gets after every round."""
    # A fixed arrangement, so that the numbers do not depend on what a machine finds fastest.
    path: Literal["vmap", "stacked"] = "vmap" if isinstance(federation.task, quadratics) else "stacked"
    engine, listener = local(path=path, chunk=chunk, workers=1, threads=1), _Listener(look)
    return run(
        federation,
        rule,
        schedule,
        rounds=rounds,
        seconds=seconds,
        evaluate=0,
        codec=codec,
        attack=attack,
        engine=engine,
        writers=[listener],
        on_start=listener.start,
    )


def follow(
    federation: Federation,
    rule: Method,
    schedule: Schedule,
    score: Callable[[Simulation], float],
    rounds: int,
    seconds: float | None = None,
    every: int = 1,
    chunk: int = 20,
) -> Scored:
    """``score`` after every ``every`` rounds of a run of ``rounds`` rounds or ``seconds`` virtual seconds."""
    found: list[tuple[float, float, float]] = []

    def look(net: Simulation) -> None:
        if net.round % every == 0:
            found.append((net.now, float(net.updates), score(net)))

    with contextlib.suppress(DivergedError):
        watch(federation, rule, schedule, look, rounds, seconds, chunk)
    return Scored(*torch.tensor(found, dtype=torch.float64).reshape(-1, 3).t().contiguous())


def models(federation: Federation, rule: Method, schedule: Schedule, rounds: int) -> tuple[Tensor, Run]:
    """The global model after every round, ``[rounds, P]``, and the run."""
    found: list[Tensor] = []
    done = watch(federation, rule, schedule, lambda net: found.append(net.state["x"]), rounds, chunk=federation.clients)
    return torch.stack(found), done


def scores(
    federations: Sequence[Federation], rule: Method, cohort: int, rounds: int, score: Callable[[Simulation], float]
) -> Tensor:
    """``score`` after every synchronous round, float64 ``[federations, rounds]``; NaN from where a run diverged."""
    found = torch.full((len(federations), rounds), torch.nan, dtype=torch.float64)
    for row, federation in zip(found, federations, strict=True):
        values = follow(federation, rule, synchronous(cohort=cohort), score, rounds, chunk=cohort).score
        row[: len(values)] = values
    return found


def bowls(fleet: Fleet | None = None) -> Federation:
    """Ten heterogeneous quadratics, one a client, in float64."""
    return Federation(quadratics(), 10, natural(), fleet, dtype="float64")


def distance_to_optimum(rule: Method, cohort: int, rounds: int) -> float:
    """Distance from the minimiser of ten heterogeneous quadratics, one a client, after ``rounds`` rounds in float64."""
    done = watch(bowls(), rule, synchronous(cohort=cohort), lambda net: None, rounds, chunk=cohort)
    return float((done.state["state.x"] - quadratics().optimum()).norm())
