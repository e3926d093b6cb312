"""Losses and metrics as functions of a model's output and the labels, one number per sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PerSample = Callable[[Tensor, Tensor], Tensor]
"""``(output [B, ...], label [B, ...]) -> [B]``."""


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood in nats; ``output`` ``[B, classes]``, or ``[B, T, classes]`` with the mean over T."""
    if output.dim() == 3:
        return F.cross_entropy(output.transpose(1, 2), y, reduction="none").mean(1)
    return F.cross_entropy(output, y, reduction="none")


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over everything but the sample axis."""
    return (output - y.view_as(output)).square().flatten(1).mean(1)


def own_loss(output: Tensor, y: Tensor) -> Tensor:
    """For models that return their loss themselves, ``[B]``."""
    return output


def accuracy(output: Tensor, y: Tensor) -> Tensor:
    """1 where the largest output is the label, else 0; for sequences the share of right positions."""
    right = (output.argmax(-1) == y).to(torch.get_default_dtype())
    return right if right.dim() == 1 else right.mean(1)
