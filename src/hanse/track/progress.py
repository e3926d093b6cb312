"""What a person sees while runs go on: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from hanse.track.run import Record
from hanse.track.summary import cost_text

PLAIN_SECONDS = 5.0
"""Pause between lines where stderr is no terminal."""


class Display:
    """Progress of ``runs`` runs of ``rounds`` rounds or ``seconds`` virtual seconds each, on ``console``.

    It counts in rounds; of a run that ends by time, in as many as its time is worth.
    """

    def __init__(self, console: Console, runs: int, rounds: int, seconds: float | None = None) -> None:
        self.console, self.rounds, self.seconds = console, rounds, seconds
        self.before, self.done, self.total = 0, 0, runs * rounds
        self.began = self.printed = time.monotonic()
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            TextColumn("left"), TimeRemainingColumn(compact=True),
        )  # fmt: skip
        self.lively = console.is_terminal and not console.is_dumb_terminal
        self.live = Progress(*columns, console=console, disable=not self.lively, transient=True)
        self.task = self.live.add_task("", total=self.total, status="")

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.live.stop()

    def run(self, label: str) -> RunDisplay:
        """The writer that shows one run."""
        return RunDisplay(self, label)

    def finish(self) -> None:
        """A run is over, or was there already."""
        self.before += self.rounds
        self.done = self.before

    def advance(self, label: str, record: Record) -> None:
        """One more round of the present run."""
        share = 0.0 if self.seconds is None else record["seconds"] / self.seconds
        self.done = self.before + min(self.rounds, max(record["round"], round(share * self.rounds)))
        if self.lively:
            self.live.update(self.task, completed=self.done, description=label, status=status(record))
        elif time.monotonic() - self.printed > PLAIN_SECONDS or record["round"] == self.rounds:
            self.printed = time.monotonic()
            left = (self.printed - self.began) / max(1, self.done) * (self.total - self.done)
            line = f"{label}  round {record['round']}/{self.rounds}  {status(record)}  {cost_text('seconds', left)} left"
            self.console.print(Text(line), soft_wrap=True)


class RunDisplay:
    """Shows the rounds of one run; keeps the last evaluation in view between evaluations."""

    def __init__(self, display: Display, label: str) -> None:
        self.display, self.label = display, label
        self.metrics: dict[str, float] = {}

    def write(self, record: Record) -> None:
        """Show one round."""
        self.metrics = record["metrics"] or self.metrics
        self.display.advance(self.label, {**record, "metrics": self.metrics})

    def close(self) -> None:
        """The run is over."""
        self.display.finish()


def status(record: Record) -> str:
    """Loss, the first score, traffic, privacy spent and virtual time of a round."""
    metrics = {n: v for n, v in record["metrics"].items() if n != "test_loss" and not n.startswith(("client_", "node_"))}
    shown = [f"loss {record['loss']:.3f}", *(f"{n} {v:.3f}" for n, v in list(metrics.items())[:1])]
    shown.append(f"down {cost_text('bytes', record['bytes_down'])}  up {cost_text('bytes', record['bytes_up'])}")
    if "epsilon" in record:
        shown.append(f"epsilon {record['epsilon']:.3g}")
    if record["seconds"]:
        shown.append(f"virtual {cost_text('seconds', record['seconds'])}")
    return "  ".join(shown)
