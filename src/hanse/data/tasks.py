"""Tasks that need no download."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import nn

from hanse.core.streams import Streams
from hanse.data.task import Dataset, Task


class digits(Task):
    """Optical digits of scikit-learn: 1,797 real 8x8 pictures in 10 classes, a fifth of them for testing; a small MLP."""

    hidden: PositiveInt = 64
    """Width of the hidden layer."""

    def data(self, streams: Streams) -> Dataset:
        from sklearn.datasets import load_digits

        raw = load_digits()
        order = streams.numpy("task").permutation(len(raw.target))
        x = torch.from_numpy(raw.data[order]).float() / 16
        y = torch.from_numpy(raw.target[order]).long()
        return Dataset(x[360:], y[360:], x[:360], y[:360], y[360:], tuple("0123456789"))

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 10))
