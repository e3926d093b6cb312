"""Flower's ServerApp: the conversation of a run, with clients that are SuperNodes.

``context.run_config`` has ``settings``, the text of a settings file, ``folder``, where the run folder is to be, and ``names``, the
clients' names in the order of their numbers.
"""

from __future__ import annotations

import logging
import tomllib
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hanse.config import Settings
from hanse.deploy.share import one_of_each, run_name
from hanse.engines.flower import GridPost, linked
from hanse.experiment import run_settings
from hanse.track.folder import SETTINGS, Folder
from hanse.track.logs import logged
from hanse.track.report import write_report

app = ServerApp()
log = logging.getLogger("hanse")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the app's configuration says; a run that was stopped goes on."""
    config = context.run_config
    settings = Settings.read(None, tomllib.loads(str(config["settings"])))
    serve(grid, settings, Path(str(config["folder"])), str(config.get("names", "")).split())


def serve(grid: Any, settings: Settings, folder: Path, names: list[str]) -> None:
    """The run of ``settings`` in ``folder``, with the clients behind ``grid``."""
    one_of_each(settings)
    resume = (folder / SETTINGS).is_file() and not Folder(folder).complete()
    name, known = run_name(settings), (Folder(folder).load() or {}).get("counts") if resume else None
    with logged(folder, fresh=not resume), linked(GridPost(grid, names, known), name):
        log.info("run %s of %d clients, %d rounds", name, settings.clients, settings.rounds)
        result = run_settings(settings, out=folder, writers=[Lines()], resume=resume)
        log.info("report: %s", write_report([result], folder, folder.resolve().name))


class Lines:
    """A line a round in the log."""

    def write(self, record: Any) -> None:
        """Take one round."""
        scores = ", ".join(f"{n} {v:.4f}" for n, v in record["metrics"].items())
        said, about = "round %d: %d replies, loss %.4f, %s", {"round": record["round"]}
        log.info(said, record["round"], len(record["cohort"]), record["loss"], scores, extra=about)

    def close(self) -> None:
        """No more rounds will come."""
