"""Trackers outside hanse behind one small interface; none is on unless asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hanse.core.errors import MissingExtraError
from hanse.track.run import Record


def require(name: str) -> None:
    """Raise ``MissingExtraError`` unless the tracker's package is installed."""
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(f"track = {name}", name)


def scalars(record: Record) -> dict[str, float]:
    """One round as flat numbers."""
    costs = {"virtual_seconds": record["seconds"], "bytes_down": record["bytes_down"], "bytes_up": record["bytes_up"]}
    return {
        "train_loss": record["loss"],
        **costs,
        "client_updates": record["updates"],
        "staleness": record["staleness"],
        **({"epsilon": record["epsilon"]} if "epsilon" in record else {}),
        **record["metrics"],
    }


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, label: str, folder: Path, settings: dict[str, str]) -> None:
        require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.events: Any = SummaryWriter(str(folder))
        self.events.add_text("settings", "\n".join(f"    {k} = {v}" for k, v in settings.items()))

    def write(self, record: Record) -> None:
        """One round as scalars."""
        for name, value in scalars(record).items():
            self.events.add_scalar(name, value, record["round"])

    def close(self) -> None:
        """Flush."""
        self.events.close()


class MLflow:
    """A run in the tracking store that ``MLFLOW_TRACKING_URI`` names."""

    def __init__(self, label: str, folder: Path, settings: dict[str, str]) -> None:
        require("mlflow")
        from mlflow import MlflowClient

        self.client: Any = MlflowClient()
        known = self.client.get_experiment_by_name("hanse")
        experiment = known.experiment_id if known else self.client.create_experiment("hanse")
        self.run = self.client.create_run(experiment, run_name=label).info.run_id
        for name, value in settings.items():
            self.client.log_param(self.run, name, value)

    def write(self, record: Record) -> None:
        """One round as metrics."""
        for name, value in scalars(record).items():
            self.client.log_metric(self.run, name, value, step=record["round"])

    def close(self) -> None:
        """End the run."""
        self.client.set_terminated(self.run)


class WandB:
    """A Weights & Biases run; ``WANDB_MODE=offline`` keeps it on this machine."""

    def __init__(self, label: str, folder: Path, settings: dict[str, str]) -> None:
        require("wandb")
        import wandb

        self.run: Any = wandb.init(project="hanse", name=label, dir=str(folder), config=settings, reinit="create_new")

    def write(self, record: Record) -> None:
        """One round as one step."""
        self.run.log(scalars(record), step=record["round"])

    def close(self) -> None:
        """End the run."""
        self.run.finish()


WRITERS: dict[str, type[TensorBoard] | type[MLflow] | type[WandB]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
