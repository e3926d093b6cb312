"""Tasks that need no download, and (from ``hanse.data.files``) those read from files."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from hanse.core.losses import PerSample, own_loss
from hanse.core.streams import Streams
from hanse.data.files import hub, images, table, texts, windows
from hanse.data.task import Dataset, Task
from hanse.models.small import ByteWindow, Quadratic, mlp

__all__ = ["digits", "hub", "images", "quadratics", "table", "text", "texts"]


class digits(Task):
    """Optical digits of scikit-learn: 1,797 real 8x8 pictures in 10 classes, a fifth of them for testing; a small MLP."""

    hidden: PositiveInt = 64
    """Width of a hidden layer."""
    depth: PositiveInt = 1
    """Number of hidden layers."""
    activation: Literal["relu", "tanh"] = "relu"
    """Of the hidden units; tanh comes with Xavier's initial weights."""

    def data(self, streams: Streams) -> Dataset:
        from sklearn.datasets import load_digits

        raw = load_digits()
        order = streams.numpy("task").permutation(len(raw.target))
        x = torch.from_numpy(raw.data[order]).float() / 16
        y = torch.from_numpy(raw.target[order]).long()
        return Dataset(x[360:], y[360:], x[:360], y[:360], y[360:], tuple("0123456789"))

    def model(self) -> nn.Module:
        return mlp(64, self.hidden, 10, depth=self.depth, activation=self.activation)


class quadratics(Task):
    """Quadratics ``f_i(x) = 0.5 (x - b_i)^T A_i (x - b_i)``, one a sample, whose mean has a known minimum.

    The ``A_i`` are diagonal, uniform in [0.5, 2]; the ``b_i`` are normal. Meant for one sample a client, where heterogeneous
    curvature makes plain averaging stop short: with the defaults, 10 clients and 10 full-batch steps at rate 0.1, FedAvg stops
    0.280 from the minimum. The test set is the training set, so that the test loss is the global objective.
    """

    count: PositiveInt = 10
    """Number of quadratics."""
    dimension: PositiveInt = 10
    """Number of coordinates."""
    spread: PositiveFloat = 2.0
    """Standard deviation of the entries of ``b_i``."""
    seed: NonNegativeInt = 0
    """Draws ``A_i`` and ``b_i``; they do not depend on the run's seed."""

    def samples(self) -> Tensor:
        """``diag(A_i)`` and ``b_i``, float64 ``[count, 2, dimension]``."""
        rng = Streams(self.seed).numpy("quadratics")
        b = self.spread * rng.normal(size=(self.count, self.dimension))
        a = rng.uniform(0.5, 2, size=(self.count, self.dimension))
        return torch.stack([torch.from_numpy(a), torch.from_numpy(b)], 1)

    def optimum(self) -> Tensor:
        """``x* = (sum A_i)^-1 sum A_i b_i``, float64 ``[dimension]``."""
        a, b = self.samples().unbind(1)
        return (a * b).sum(0) / a.sum(0)

    @property
    def loss(self) -> PerSample:
        return own_loss

    @property
    def metrics(self) -> Mapping[str, PerSample]:
        return {}

    def data(self, streams: Streams) -> Dataset:
        x = self.samples()
        y = torch.zeros(self.count)
        return Dataset(x, y, x, y, torch.zeros(self.count, dtype=torch.long), ("quadratic",), torch.arange(self.count))

    def model(self) -> nn.Module:
        return Quadratic(self.dimension)


class text(Task):
    """Next-byte prediction on the source of Python's standard library; its packages and larger modules are natural clients.

    The text is that of the running Python, so numbers differ between Python versions. A tenth of the windows is for testing.
    """

    length: PositiveInt = 64
    """Bytes per sample."""
    hidden: PositiveInt = 128
    """Width of the model's hidden layer."""

    def data(self, streams: Streams) -> Dataset:
        return windows("standard library", standard_library(), self.length, streams)

    def model(self) -> nn.Module:
        return ByteWindow(hidden=self.hidden)


LEAST, MOST = 8 << 10, 16 << 10
"""Bytes of text that a package or module of the standard library needs, and gives at most."""


def standard_library() -> dict[str, bytes]:
    """Source text of the top-level packages and modules with enough of it, by name, in the order of their names."""
    skipped = {"test", "idlelib", "lib2to3", "site-packages", "encodings", "pydoc_data", "turtledemo", "__pycache__"}
    found: dict[str, bytes] = {}
    for place in sorted(Path(sysconfig.get_path("stdlib")).iterdir()):
        if place.name in skipped or place.name.startswith("_sysconfigdata"):
            continue
        source = bytearray()
        for file in [place] if place.suffix == ".py" else sorted(place.glob("*.py")):
            source += file.read_bytes()
            if len(source) >= MOST:
                break
        if len(source) >= LEAST:
            found[place.stem] = bytes(source[:MOST])
    return found
