"""The folder of one run: settings, an append-only history, checkpoints. What is in it survives a kill at any moment."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanse.core.errors import CheckpointError
from hanse.track.run import Record, Run

HISTORY, CHECKPOINT, SETTINGS, CLIENTS = "history.jsonl", "checkpoint.safetensors", "run.json", "clients.safetensors"
STATUS, LOG = "status.json", "log.jsonl"


class Folder:
    """``path`` holds ``run.json`` (settings and notes), ``history.jsonl``, ``checkpoint.safetensors`` and, at the end,
    ``clients.safetensors``; a run that goes on keeps ``status.json`` and ``log.jsonl`` there. Raises ``CheckpointError`` with the
    reason when it cannot be written or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, run: Run) -> None:
        """A whole run at once; an earlier run in the folder is replaced."""
        self.make()
        self.clear()
        self.describe(run)
        self.replace(HISTORY, b"".join(json.dumps(r).encode() + b"\n" for r in run.history))
        if run.clients:
            self.save(run.clients, CLIENTS)
        if run.state or run.weights:
            self.checkpoint(run.state, run.weights)

    def make(self) -> None:
        """Have the folder be there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"out: {self.path} cannot be written: {error.strerror}") from None

    def checkpoint(self, state: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Replace the checkpoint: what a run goes on from, and the model by name."""
        self.save({**state, **{f"weights.{n}": t for n, t in weights.items()}})

    def complete(self) -> bool:
        """Whether the run has come to its end, and a checkpoint of its last round."""
        counters = (self.load() or {}).get("counters")
        return counters is not None and int(counters[0]) == len(self.history()) and (self.path / CLIENTS).is_file()

    def clear(self) -> None:
        """Remove an earlier run's files."""
        try:
            for name in (SETTINGS, HISTORY, CHECKPOINT, CLIENTS, STATUS):
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"out: {self.path} cannot be written: {error.strerror}") from None

    def describe(self, run: Run) -> None:
        """Replace ``run.json``."""
        about = {"method": run.method, "seed": run.seed, "settings": run.settings, "names": run.names, "notes": run.notes}
        about |= {"answers": run.answers}
        self.replace(SETTINGS, json.dumps(about, indent=1).encode())

    def _about(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.path / SETTINGS).read_text())
            return {name: found[name] for name in ("method", "seed", "settings", "names", "notes")} | {
                "answers": found.get("answers", [])
            }
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(f"{self.path} is not a run folder: no readable {SETTINGS}") from None

    def append(self, record: Record) -> None:
        """Add one line to the history."""
        try:
            with (self.path / HISTORY).open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise CheckpointError(f"{self.path / HISTORY} cannot be written: {error.strerror}") from None

    def history(self) -> list[Record]:
        """All whole lines; a last line cut off by a kill is dropped."""
        try:
            lines = (self.path / HISTORY).read_bytes().split(b"\n")[:-1]
            found = [json.loads(line) for line in lines]
            names = Record.__annotations__.keys()
            return [Record(**{n: r[n] for n in names if n in r or n != "epsilon"}) for r in found]  # type: ignore[typeddict-item]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path / HISTORY} is damaged: {error}") from None

    def rewind(self, rounds: int) -> list[Record]:
        """Cut the history back to the first ``rounds`` rounds, which a checkpoint covers, and return it."""
        kept = self.history()[:rounds]
        self.replace(HISTORY, b"".join(json.dumps(r).encode() + b"\n" for r in kept))
        return kept

    def save(self, tensors: dict[str, Tensor], name: str = CHECKPOINT) -> None:
        """Write tensors so that the file is at every moment either the old or the new one."""
        from safetensors.torch import save

        held: set[int] = set()  # a message that is still out shares its memory with the state it was made of, which a file cannot
        apart = {}
        for n, t in tensors.items():
            t = t.detach().cpu().contiguous()
            place = t.untyped_storage().data_ptr()
            apart[n] = t.clone() if place in held else t
            held.add(place)
        self.replace(name, save(apart))

    def load(self, name: str = CHECKPOINT) -> dict[str, Tensor] | None:
        """The saved tensors, None if there are none yet; raises ``CheckpointError`` on a damaged file."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors: dict[str, Tensor] = load((self.path / name).read_bytes())
            return tensors
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.path / name} is damaged or not a checkpoint: {error}") from None

    def read(self) -> Run:
        """The run as far as it got."""
        about, clients, saved = self._about(), self.load(CLIENTS) or {}, self.load() or {}
        weights = {n.removeprefix("weights."): t for n, t in saved.items() if n.startswith("weights.")}
        return Run(
            method=about["method"],
            seed=about["seed"],
            settings=about["settings"],
            history=self.history(),
            weights=weights,
            clients=clients,
            names=tuple(about["names"]),
            notes=about["notes"],
            answers=about["answers"],
        )

    def replace(self, name: str, data: bytes) -> None:
        """Write a file so that it is at every moment either the old or the new one."""
        target, part = self.path / name, self.path / f".{name}.part"
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise CheckpointError(f"{target} cannot be written: {error.strerror}; the last good one is kept") from None


def worst_share(values: Tensor, share: float = 0.1) -> float:
    """Mean of the worst ``share`` (at least one) of the values that are not NaN."""
    ranked = values[~torch.isnan(values)].sort().values
    return float(ranked[: max(1, int(share * len(ranked)))].mean()) if len(ranked) else float("nan")
