"""What a task is: data, and the model, loss and metrics that go with them; and what a partition makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypedDict

import torch
from torch import Tensor, nn

from hanse.core.errors import ConfigError, DataError
from hanse.core.losses import PerSample, accuracy, cross_entropy
from hanse.core.part import Part
from hanse.core.problem import Problem
from hanse.core.samples import Samples
from hanse.core.streams import Streams


@dataclass(frozen=True)
class Dataset:
    """Training samples ``x`` ``[N, ...]``, ``y`` ``[N, ...]`` and a global test set.

    ``group`` int64 ``[N]`` is what partitions look at, from 0 up: usually the class, and ``names`` their names; ``owner`` int64
    ``[N]`` is the natural client (writer, package, hospital) where the data have one.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    group: Tensor
    names: tuple[str, ...]
    owner: Tensor | None = None
    owner_names: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ``DataError`` where lengths differ, a group has no name or an owner is negative."""
        for field, values in (("y", self.y), ("group", self.group), ("owner", self.group if self.owner is None else self.owner)):
            if len(values) != len(self.x):
                raise DataError(f"{field}: {len(values)} entries do not fit {len(self.x)} samples")
        wrong = self.group[(self.group < 0) | (self.group >= len(self.names))]
        if len(wrong):
            raise DataError(f"label {int(wrong[0])} is not allowed: 0 to {len(self.names) - 1}")
        if self.owner is not None and len(self.owner) and int(self.owner.min()) < 0:
            raise DataError(f"owner {int(self.owner.min())} is not allowed: 0 or more")


@dataclass(frozen=True)
class Split:
    """A data set split over clients: training and test samples of each, and the global test set.

    ``groups`` int64 ``[clients, len(names)]`` counts training samples per client and class, for pictures (None where there are too
    many clients to draw); ``newcomers`` are all samples of the clients that take no part in training.
    """

    train: Samples
    test: Samples
    test_x: Tensor
    test_y: Tensor
    names: tuple[str, ...] = ()
    groups: Tensor | None = None
    newcomers: Samples | None = None

    def to(self, device: str, dtype: torch.dtype) -> Split:
        """Copy to a device and floating type."""
        x, y = (t.to(device, dtype if t.is_floating_point() else t.dtype) for t in (self.test_x, self.test_y))
        train = self.train.to(device, dtype)

        def moved(part: Samples) -> Samples:
            shared = replace(part, x=train.x, y=train.y) if part.x is self.train.x else part
            return shared.to(device, dtype)

        newcomers = None if self.newcomers is None else moved(self.newcomers)
        return Split(train, moved(self.test), x, y, self.names, self.groups, newcomers)


class Answer(TypedDict):
    """What a model says to something it is asked, before and after training, and what was expected."""

    asked: str
    expected: str
    before: str
    after: str


class Task(Part):
    """Base of all tasks."""

    kind: ClassVar[str] = "task"
    abstract: ClassVar[bool] = True

    @property
    def loss(self) -> PerSample:
        """Loss per sample."""
        return cross_entropy

    @property
    def metrics(self) -> Mapping[str, PerSample]:
        """Metrics per sample, by name."""
        return {"accuracy": accuracy}

    def data(self, streams: Streams) -> Dataset:
        """Load or make the data."""
        raise TypeError(f"{type(self).__name__} does not define data")

    def answers(self, problem: Problem, w: Tensor, buffers: Tensor, x: Tensor, y: Tensor) -> list[Answer]:
        """What the trained model ``w`` ``[P]`` says to some test samples, for the report; nothing where outputs are no text."""
        return []

    def export(self, module: nn.Module, folder: Path, merge: bool) -> None:
        """Write a trained model for others: its tensors by name, as ``model.safetensors``.

        ``merge`` has what was trained beside a model become part of it; raises ``ConfigError`` where there is nothing of the kind.
        """
        from safetensors.torch import save_model

        if merge:
            raise ConfigError("merge: not allowed: nothing was trained beside this task's model")
        folder.mkdir(parents=True)
        save_model(module, str(folder / "model.safetensors"))

    def model(self) -> nn.Module:
        """A freshly initialised model (torch's global generator is seeded by the caller)."""
        raise TypeError(f"{type(self).__name__} does not define model")
