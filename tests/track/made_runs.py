"""Made-up runs: what a report sees of four rules on 100 clients, with numbers that a test can work out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hanse.track.run import Job, Record, Run


def record(
    round: int, *, accuracy: float | None = None, loss: float = 1.0, down: int = 0, up: int = 0, seconds: float = 0.0
) -> Record:
    """One round; without accuracy it was not evaluated."""
    metrics = {} if accuracy is None else {"accuracy": accuracy, "test_loss": loss}
    return Record(
        round=round,
        seconds=seconds,
        bytes_down=down,
        bytes_up=up,
        loss=loss,
        metrics=metrics,
        cohort=[0, 1],
        staleness=0.0,
        updates=2 * round,
        jobs=[],
    )


def working(
    *jobs: Job, method: str = "FedAvg", clients: int = 4, away: Sequence[tuple[int, float, float]] = (), **settings: str
) -> Run:
    """A run in whose last round all these jobs ended."""
    made = run(method, clients=clients, **settings)
    made.history[-1]["jobs"] = list(jobs)
    made.history[-1]["seconds"] = max((time for job in jobs for time in job[2:] if time is not None), default=0.0)
    made.clients["away"] = torch.tensor(away, dtype=torch.float64).reshape(-1, 3)
    return made


def run(
    method: str = "FedAvg",
    seed: int = 0,
    accuracies: Sequence[float | None] = (0.5, 0.8, 0.9),
    *,
    up: int = 1000,
    seconds: float = 2.0,
    clients: int = 4,
    **settings: str,
) -> Run:
    """A run with one round for each accuracy; each round sends ``up`` bytes either way and takes ``seconds``."""
    history = [
        record(t, accuracy=a, loss=1 / t, down=up * t, up=up * t, seconds=seconds * t) for t, a in enumerate(accuracies, start=1)
    ]
    rounds = torch.zeros(clients, dtype=torch.long)
    rounds[:2] = len(history)
    described = {"task": "digits", "clients": str(clients), "method": method, "rounds": str(len(history)), "seed": str(seed)}
    tables = {"samples": torch.full((clients,), 10), "rounds": rounds}
    return Run(method, seed, described | settings, history, {}, tables)
