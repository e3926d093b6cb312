"""Run a rule on a federation, and go on with a run that was stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from hanse.codecs.base import Codec, identity
from hanse.core.errors import CheckpointError, DivergedError, HanseError
from hanse.engines.local import LocalNetwork, local
from hanse.federation import Federation
from hanse.methods.base import Method
from hanse.schedules.network import Schedule
from hanse.schedules.synchronous import synchronous
from hanse.track.folder import CLIENTS, Folder, worst_share
from hanse.track.run import Record, Run

CHECKPOINT_SECONDS = 5.0
COHORT_LISTED = 256
"""Longest cohort written into the history client by client."""


class Writer(Protocol):
    """Anything that wants every committed round: progress, TensorBoard, MLflow."""

    def write(self, record: Record) -> None:
        """Take one round."""
        ...

    def close(self) -> None:
        """No more rounds will come."""
        ...


class Recorder:
    """Turns committed rounds into history, checkpoints and evaluations."""

    def __init__(self, federation: Federation, rounds: int, every: int, folder: Folder | None, writers: Sequence[Writer]) -> None:
        self.federation, self.rounds, self.every, self.folder, self.writers = federation, rounds, every, folder, writers
        self.history: list[Record] = []
        self.saved_at = time.monotonic()
        self.accuracy: torch.Tensor | None = None

    def __call__(self, net: LocalNetwork) -> None:
        due = net.round == self.rounds or (self.every > 0 and net.round % self.every == 0)
        listed = net.cohort.tolist() if len(net.cohort) <= COHORT_LISTED else []
        record = Record(
            round=net.round,
            seconds=net.traffic.seconds,
            bytes_down=net.traffic.down,
            bytes_up=net.traffic.up,
            loss=net.loss,
            metrics=self.evaluate(net) if due else {},
            cohort=listed,
        )
        self.history.append(record)
        if self.folder is not None:
            self.folder.append(record)
            if net.round == self.rounds or net.stopping or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                self.save(net)
        for writer in self.writers:
            writer.write(record)

    def save(self, net: LocalNetwork) -> None:
        """Write a checkpoint; raises ``DivergedError`` rather than save a model that is not finite."""
        if not bool(torch.isfinite(net.state["x"]).all()):
            raise DivergedError(f"the model of round {net.round} is not finite; lower lr or set clip")
        if self.folder is not None:
            self.folder.save({**net.snapshot(), **{f"weights.{n}": t for n, t in weights(net).items()}})
        self.saved_at = time.monotonic()

    def evaluate(self, net: LocalNetwork) -> dict[str, float]:
        """Loss and metrics on the global test set, and mean, worst 10 % and variance of each metric over the clients' test parts."""
        problem, split = self.federation.problem, self.federation.split
        found: dict[str, float] = {}
        everyone = torch.arange(net.clients)
        kept = net.kept.read(everyone) if net.kept.widths else {}
        w, buffers = net.state["x"], net.state.get("buffers", problem.start_buffers)
        if "private" in kept or "buffers" in kept:
            rest = kept.get("private", w.new_empty(net.clients, 0))
            w, buffers = torch.cat([w.expand(net.clients, -1), rest], 1), kept.get("buffers", buffers)
        elif len(split.test_x):
            scores = problem.evaluate(w, buffers, split.test_x, split.test_y)
            found = {("test_loss" if n == "loss" else n): v for n, v in scores.items()}
            if not math.isfinite(found["test_loss"]):
                raise DivergedError(f"the loss of the global model in round {net.round} is {found['test_loss']}; lower lr or set clip")
        if len(split.test.x) and int(split.test.counts().sum()):
            for name, values in problem.evaluate_clients(w, buffers, split.test).items():
                if name in problem.metrics:
                    there = values[~torch.isnan(values)]
                    found |= {
                        f"client_{name}": float(there.mean()),
                        f"client_{name}_worst10": worst_share(values),
                        f"client_{name}_variance": float(there.var(correction=0)),
                    }
                    if self.accuracy is None or name == next(iter(problem.metrics)):
                        self.accuracy = values
        return found


def weights(net: LocalNetwork) -> dict[str, torch.Tensor]:
    """The global model as named tensors: shared parameters, and averaged buffers."""
    problem = net.problem
    full = torch.cat([net.state["x"], problem.start[problem.shared :]])
    named = {n: t.clone() for n, t in problem.layout.views(full).items()}
    if "buffers" in net.state:
        named |= {n: t.clone() for n, t in problem.buffer_layout.views(net.state["buffers"]).items()}
    return named


def run(
    federation: Federation,
    method: Method,
    schedule: Schedule | None = None,
    *,
    rounds: int = 100,
    codec: Codec | None = None,
    engine: local | None = None,
    seed: int | None = None,
    evaluate: int = 1,
    out: Path | str | None = None,
    writers: Sequence[Writer] = (),
    resume: bool = False,
    about: dict[str, Any] | None = None,
    on_start: Callable[[LocalNetwork], None] = lambda net: None,
) -> Run:
    """Train ``method`` on ``federation`` for ``rounds`` rounds.

    ``evaluate``: every how many rounds (0: only after the last). ``seed`` (default the federation's) draws cohorts and batches.
    ``out``: a run folder to write; with ``resume`` the run goes on from its checkpoint. Raises ``DivergedError`` when the training
    loss is not finite, after saving the last good round.
    """
    schedule, codec, engine = schedule or synchronous(), codec or identity(), engine or local()
    seed = federation.seed if seed is None else seed
    folder = None if out is None else Folder(Path(out))
    recorder = Recorder(federation, rounds, evaluate, folder, writers)
    net = LocalNetwork(federation, method, engine, codec, seed=seed, rounds=rounds, on_commit=recorder)
    settings = {
        "task": federation.task, "clients": federation.clients, "partition": federation.partition, "fleet": federation.fleet,
        "method": method, "schedule": schedule, "codec": codec, "engine": engine, "rounds": rounds, "seed": seed,
        "evaluate": evaluate,
    }  # fmt: skip
    result = Run(type(method).__name__, seed, {k: str(v) for k, v in settings.items()}, recorder.history, {}, names=federation.split.names)
    if folder is not None:
        description = {**(about or {}), "method": result.method, "seed": seed, "settings": result.settings, "names": result.names}
        if resume:
            saved = folder.load()
            if saved is not None:
                net.restore(saved)
            recorder.history[:] = folder.rewind(net.round)
        else:
            folder.create({**description, "notes": {}})
    on_start(net)
    try:
        conversation = schedule.run(net, method)
        try:
            conversation.send(None)
        except StopIteration:
            pass
        else:
            raise HanseError(f"{schedule}: the conversation waits for something that this engine never sends")
    except DivergedError:
        if folder is not None and net.round and bool(torch.isfinite(net.state["x"]).all()):
            recorder.save(net)
        raise
    finally:
        for writer in writers:
            writer.close()
    result.weights = weights(net) if net.state else {}
    result.clients = {"samples": net.samples.counts(), "rounds": net.taken.long()}
    if federation.split.groups is not None:
        result.clients["classes"] = federation.split.groups
    if recorder.accuracy is not None:
        result.clients["accuracy"] = recorder.accuracy
    result.notes["arrangement"] = str(net.arrangement)
    if folder is not None:
        folder.save(result.clients, CLIENTS)
        folder.describe({**description, "notes": result.notes})
    return result


def finished(folder: Folder) -> bool:
    """Whether a run has all its rounds."""
    return len(folder.history()) >= int(folder.about()["settings"]["rounds"])


def not_resumable(path: Path) -> CheckpointError:
    """The error for a folder that holds no run."""
    return CheckpointError(f"{path} holds no run: no run.json in it or in its subfolders")
