"""Final models for others."""

from __future__ import annotations

from pathlib import Path

from hanse.config import Settings
from hanse.core.errors import ConfigError
from hanse.track.folder import Folder


def export(run: Path | str, folder: Path | str, merge: bool = False) -> None:
    """Write the model that the run folder ``run`` ended with to ``folder`` (see ``Task.export``).

    Raises ``CheckpointError`` where there is no run, and ``ConfigError`` where ``folder`` is there already.
    """
    out, result = Path(folder), Folder(Path(run)).read()
    if out.exists():
        raise ConfigError(f"folder: {out} is not allowed: it is there already")
    settings = Settings.read(None, result.settings)
    federation = settings.federation(settings.seed[0])
    federation.task.export(federation.problem.module(*federation.problem.vectors(result.weights)), out, merge)
