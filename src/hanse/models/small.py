"""Small networks for the tasks that come with hanse. All run under ``torch.vmap``: no state, no batch statistics."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(
    inputs: int, hidden: int, outputs: int, flatten: bool = False, depth: int = 1, activation: Literal["relu", "tanh"] = "relu"
) -> nn.Sequential:
    """``depth`` hidden layers: ``[B, inputs]`` (of any shape if ``flatten``) to ``[B, outputs]``.

    Initial weights are torch's; with tanh those of Glorot and Bengio (AISTATS 2010, "Xavier"), who derived them for it: uniform,
    of variance ``2 / (fan_in + fan_out)``, and biases 0.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((inputs, *(hidden,) * depth, outputs)):
        linear = nn.Linear(fan_in, fan_out)
        if activation == "tanh":
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU() if activation == "relu" else nn.Tanh()]
    return nn.Sequential(nn.Flatten(), *layers[:-1]) if flatten else nn.Sequential(*layers[:-1])


def cnn(channels: int, height: int, width: int, outputs: int, hidden: int = 128) -> nn.Sequential:
    """Two 5x5 convolutions (32 and 64 channels), each pooled to half size, one hidden layer: ``[B, C, H, W]`` to ``[B, outputs]``.

    The network of McMahan et al. (AISTATS 2017) for MNIST, there with a hidden layer of 512. Height and width are at least 4.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs),
    )


class ByteWindow(nn.Module):
    """Next-byte prediction from the last ``context`` bytes: ``[B, T]`` int64 to logits ``[B, T, 256]``.

    The neural language model of Bengio et al. (JMLR 2003): embeddings side by side, one hidden layer. Places before the first
    byte read as zeros.
    """

    def __init__(self, context: int = 8, width: int = 16, hidden: int = 128) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(256, width)
        self.hidden = nn.Linear(context * width, hidden)
        self.head = nn.Linear(hidden, 256)

    def forward(self, x: Tensor) -> Tensor:
        e = F.pad(self.embed(x), (0, 0, self.context - 1, 0))
        seen = torch.cat([e[:, i : i + x.shape[1]] for i in range(self.context)], -1)
        out: Tensor = self.head(F.relu(self.hidden(seen)))
        return out


class Quadratic(nn.Module):
    """A point ``x`` ``[d]``, at first 0; samples ``(a, b)`` ``[B, 2, d]`` to losses ``0.5 sum_j a_j (x_j - b_j)^2`` ``[B]``."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(dimension))

    def forward(self, sample: Tensor) -> Tensor:
        a, b = sample.unbind(1)
        return 0.5 * (a * (self.x - b).square()).sum(-1)
