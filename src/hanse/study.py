"""A study: every rule under every schedule through every codec with every seed, in one folder, with one report."""

from __future__ import annotations

import logging
import math
import platform
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console

from hanse.codecs.base import Codec
from hanse.config import Settings
from hanse.core.errors import CheckpointError
from hanse.core.part import Part
from hanse.engines.estimate import Estimate, estimate
from hanse.engines.simulation import Simulation
from hanse.experiment import Writer, run
from hanse.federation import Federation
from hanse.methods.base import Method
from hanse.schedules.network import Schedule
from hanse.track.folder import LOG, SETTINGS, Folder
from hanse.track.logs import logged
from hanse.track.progress import Display
from hanse.track.report import write_report
from hanse.track.run import Run
from hanse.track.summary import Against, cost_text
from hanse.track.writers import WRITERS, require

STUDY = "settings.toml"
LEAST_FREE = 16 << 20
"""Bytes that must be free where the run folder is to be."""


class Cell(NamedTuple):
    """One run of a study."""

    method: Method
    schedule: Schedule
    codec: Codec
    seed: int
    path: Path


P = TypeVar("P", bound=Part)


def numbered(parts: Sequence[P]) -> dict[str, P]:
    """Parts by name in lower case, with a number where a name appears more than once."""
    names = [part.short_name.lower() for part in parts]
    labels = [n if names.count(n) == 1 else f"{n}-{names[:i].count(n) + 1}" for i, n in enumerate(names)]
    return dict(zip(labels, parts, strict=True))


class Study:
    """``settings`` run in ``folder``: one subfolder a run, ``settings.toml``, ``report.html`` and pictures.

    Raises ``ConfigError`` on wrong settings and ``CheckpointError`` where the folder cannot be written, both before any work.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.methods, self.schedules, self.codecs, self.down, self.engine, self.privacy, self.attack = settings.parts()
        self.console = Console(stderr=True)
        self.stopped, self.single, self.net = False, False, None
        self.federations: dict[int, Federation] = {}
        for name in settings.track:
            require(name)

    net: Simulation | None

    @classmethod
    def open(cls, folder: Path) -> Study:
        """The study in ``folder``, or the single run in it."""
        if (folder / SETTINGS).is_file():
            found = cls(Settings.read(None, Folder(folder).read().settings), folder)
            found.single = True
            return found
        if not (folder / STUDY).is_file():
            raise CheckpointError(f"{folder} holds no run: no {STUDY} in it")
        return cls(Settings.read(folder / STUDY, {}), folder)

    def federation(self, seed: int) -> Federation:
        """The federation of a seed, shared by all rules."""
        if seed not in self.federations:
            self.federations[seed] = self.settings.federation(seed)
        return self.federations[seed]

    def cells(self) -> Iterator[Cell]:
        """Every rule under every schedule through every codec with every seed, and its folder; of a single run, the study's own."""
        if self.single:
            yield Cell(self.methods[0], self.schedules[0], self.codecs[0], self.settings.seed[0], self.folder)
            return
        rules, schedules, codecs = numbered(self.methods), numbered(self.schedules), numbered(self.codecs)
        for seed, rule, schedule, codec in product(self.settings.seed, rules, schedules, codecs):
            label = [rule, *([schedule] if len(schedules) > 1 else []), *([codec] if len(codecs) > 1 else [])]
            path = self.folder / f"{'-'.join(label)}-seed{seed}"
            yield Cell(rules[rule], schedules[schedule], codecs[codec], seed, path)

    @property
    def count(self) -> int:
        """Number of runs."""
        return len(self.methods) * len(self.schedules) * len(self.codecs) * len(self.settings.seed)

    def interrupt(self, *_: Any) -> None:
        """Stop after the current round; a second time, at once."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        if self.net is not None:
            self.net.stopping = True
        self.console.print("stopping after this round; once more to stop at once")

    def estimate(self) -> Estimate:
        """Expected costs of all runs together, from two probe clients, one evaluation and a rehearsal of each."""
        parts = [self._estimate_one(*cell) for cell in product(self.methods, self.schedules, self.codecs)]
        seeds = len(self.settings.seed)
        return Estimate(
            wall=seeds * sum(p.wall for p in parts),
            virtual=seeds * sum(p.virtual for p in parts),
            down=seeds * sum(p.down for p in parts),
            up=seeds * sum(p.up for p in parts),
            memory=max(p.memory for p in parts),
        )

    def _estimate_one(self, method: Method, schedule: Schedule, codec: Codec) -> Estimate:
        from dataclasses import replace

        from hanse.experiment import evaluate

        seed, rounds = self.settings.seed[0], self.settings.rounds
        end = self.settings.seconds or math.inf
        net = Simulation(
            self.federation(seed),
            method,
            self.engine,
            codec,
            self.down,
            seed=seed,
            rounds=rounds,
            seconds=end,
            privacy=self.privacy,
            attack=self.attack,
            schedule=schedule,
        )
        found = estimate(net, schedule)
        net.begin(method.init(net.problem))
        evaluate(net)
        began = time.perf_counter()
        evaluate(net)
        once = time.perf_counter() - began
        times = rounds // self.settings.evaluate if self.settings.evaluate else 1
        if self.settings.evaluate_seconds is not None:
            times = int(found.virtual / self.settings.evaluate_seconds)
        return replace(found, wall=found.wall + once * times)

    def describe(self, found: Estimate) -> str:
        """An estimate in words."""
        data = sum(t.nbytes for s in (self.federation(self.settings.seed[0]).split,) for t in (s.train.x, s.train.y, s.test_x))
        runs, size = self.count, cost_text("bytes", data)
        virtual = f", {cost_text('seconds', found.virtual)} virtual" if found.virtual else ""
        return (
            f"estimate for {runs} run{'s' if runs > 1 else ''} of {self.settings.rounds} rounds: "
            f"{cost_text('seconds', found.wall)} here{virtual}, {cost_text('bytes', found.down)} down, "
            f"{cost_text('bytes', found.up)} up, {cost_text('bytes', found.memory)} of memory beyond {size} of data"
        )

    def run(self, resume: bool = False) -> list[Run]:
        """All runs; with ``resume``, finished ones are read and unfinished ones go on."""
        expected = self.estimate()
        self.console.print(self.describe(expected), highlight=False, soft_wrap=True)
        self._prepare(resume)
        began, runs = time.monotonic(), []
        with Display(self.console, self.count, self.settings.rounds, self.settings.seconds) as display:
            for cell in self.cells():
                path = cell.path
                if self.stopped:
                    break
                there = resume and (path / SETTINGS).is_file()
                if there and Folder(path).complete():
                    runs.append(Folder(path).read())
                    display.finish()
                    continue
                with logged(path, fresh=not there, least=logging.WARNING):  # of the rest there is a display
                    runs.append(self._run_one(cell, there, display.run(path.name)))
        spent = time.monotonic() - began
        if runs and not self.stopped and not resume:
            self._judge(expected, runs, spent)
        return runs

    def _run_one(self, cell: Cell, resume: bool, display: Writer) -> Run:
        path = cell.path
        settings = {name: str(value) for name, value in self.settings.model_dump().items()}
        trackers = [WRITERS[name](path.name, path, settings) for name in self.settings.track]

        def started(net: Simulation) -> None:
            self.net, net.stopping = net, self.stopped

        return run(
            self.federation(cell.seed),
            cell.method,
            cell.schedule,
            rounds=self.settings.rounds,
            seconds=self.settings.seconds,
            codec=cell.codec,
            down=self.down,
            privacy=self.privacy,
            attack=self.attack,
            engine=self.engine,
            seed=cell.seed,
            evaluate=self.settings.evaluate,
            evaluate_seconds=self.settings.evaluate_seconds,
            out=path,
            writers=[display, *trackers],
            resume=resume,
            metrics_port=self.settings.metrics_port,
            on_start=started,
        )

    def _prepare(self, resume: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self.folder).free < LEAST_FREE:
                raise CheckpointError(f"out: the disk of {self.folder} is full")
            if not resume:
                for cell in self.cells():  # a later resume must not take an earlier study's runs for this one's
                    Folder(cell.path).clear()
                    (cell.path / LOG).unlink(missing_ok=True)
                Folder(self.folder).replace(STUDY, self.settings.toml().encode())
        except OSError as error:
            raise CheckpointError(f"out: {self.folder} cannot be written: {error.strerror}") from None

    def _judge(self, expected: Estimate, runs: list[Run], spent: float) -> None:
        """Note how good the estimate was, for the report."""
        down = sum(r.history[-1]["bytes_down"] for r in runs)
        up = sum(r.history[-1]["bytes_up"] for r in runs)
        virtual = sum(r.history[-1]["seconds"] for r in runs)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        pairs: dict[str, tuple[Against, float, float]] = {
            "time here": ("seconds", expected.wall, spent),
            "virtual time": ("seconds", expected.virtual, virtual),
            "bytes down": ("bytes", expected.down, down),
            "bytes up": ("bytes", expected.up, up),
        }
        for run_, cell in zip(runs, self.cells(), strict=True):
            for name, (unit, guess, actual) in pairs.items():
                if actual:
                    ratio = f", {guess / actual:.2f} of it" if actual else ""
                    run_.notes[f"estimated {name}"] = f"{cost_text(unit, guess)}, was {cost_text(unit, actual)}{ratio}"
            run_.notes["peak memory of the process"] = cost_text("bytes", peak)
            Folder(cell.path).describe(run_)

    def report(self, runs: list[Run]) -> Path:
        """Write ``report.html`` and the pictures."""
        compared: list[Sequence[Part]] = [self.methods, *(parts for parts in (self.schedules, self.codecs) if len(parts) > 1)]
        return write_report(
            runs, self.folder, f"{self.folder.name}: {', '.join(part.short_name for parts in compared for part in parts)}"
        )


def runs_in(folder: Path) -> list[Run]:
    """The run in ``folder``, or those of the study there that have begun; raises ``CheckpointError`` where there is none."""
    found = [Folder(path).read() for path in folders_in(folder) if (path / SETTINGS).is_file()]
    if not found:
        raise CheckpointError(f"{folder} holds no run: no {SETTINGS} in it or in its subfolders")
    return found


def folders_in(folder: Path) -> list[Path]:
    """``folder`` where it is that of a run, or those of the runs of the study there, begun or not; else none."""
    if (folder / SETTINGS).is_file() or (folder / LOG).is_file():  # a run that waits for its first client has a log alone
        return [folder]
    return [cell.path for cell in Study.open(folder).cells()] if (folder / STUDY).is_file() else []
