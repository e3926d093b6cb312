"""Losses and metrics of sequences, one number per sequence, over its labelled positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of positions that do not count, as torch has it."""


def answer_loss(output: Tensor, y: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats; ``output`` ``[B, T, vocabulary]``, ``y`` ``[B, T]``; 0 where nothing is labelled."""
    each = F.cross_entropy(output.transpose(1, 2), y, reduction="none", ignore_index=IGNORED)
    return each.sum(1) / (y != IGNORED).sum(1).clamp(min=1)


def tokens(output: Tensor, y: Tensor) -> Tensor:
    """Share of the labelled positions whose likeliest token is the label."""
    labelled = y != IGNORED
    right = (output.argmax(-1) == y) & labelled
    return right.sum(1).to(torch.get_default_dtype()) / labelled.sum(1).clamp(min=1)


def exact(output: Tensor, y: Tensor) -> Tensor:
    """1 where every labelled position is right, else 0: whether greedy decoding gives exactly this answer and then ends.

    Up to the first wrong token both read the same, so the answer need not be generated to know that.
    """
    return ((output.argmax(-1) == y) | (y == IGNORED)).all(1).to(torch.get_default_dtype())
