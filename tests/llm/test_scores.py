"""Losses over answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hanse.llm.scores import IGNORED, answer_loss, exact, tokens


def test_only_labelled_positions_count() -> None:
    torch.manual_seed(0)
    output, y = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(7, (3, 5))
    y[0, :2], y[1] = IGNORED, IGNORED
    output.requires_grad_(True)
    loss = answer_loss(output, y)
    torch.testing.assert_close(loss[0], F.cross_entropy(output[0, 2:], y[0, 2:]))
    torch.testing.assert_close(loss[2], F.cross_entropy(output[2], y[2]))
    assert loss[1] == 0
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert (gradient[0, :2] == 0).all() and (gradient[1] == 0).all() and (gradient[0, 2:] != 0).any(-1).all()


def test_shares_of_right_tokens_and_whole_answers() -> None:
    y = torch.tensor([[IGNORED, 1, 2, 3], [IGNORED, 1, 2, 3]])
    output = F.one_hot(torch.tensor([[9, 1, 2, 3], [9, 1, 0, 3]]), 10).float()
    torch.testing.assert_close(tokens(output, y), torch.tensor([1.0, 2 / 3]))
    assert exact(output, y).tolist() == [1.0, 0.0]
