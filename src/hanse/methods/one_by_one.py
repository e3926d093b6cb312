"""The way out for client work that can't be batched: ordinary PyTorch, one client at a time, with the same accounting.

A rule derives from ``OneByOne`` and writes ``train_one``: two optimisers, a detector's own training loop, a Hugging Face trainer,
anything that takes a module and leaves it trained. Sampling, averaging, bytes, virtual time and checkpoints are those of FedAvg.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn

from hanse.core.context import Context
from hanse.core.messages import Tensors, Upload
from hanse.methods.fedavg import FedAvg


class OneByOne(FedAvg):
    """FedAvg whose client work is a plain PyTorch function."""

    abstract: ClassVar[bool] = True
    batched: ClassVar[bool] = False

    def train_one(
        self, model: nn.Module, data: tuple[Tensor, Tensor], message: Tensors, lr: float, generator: torch.Generator
    ) -> float:
        """Train ``model`` in place on one client's samples ``data = (x, y)``; returns the mean training loss.

        ``generator`` is this client's own in this round. The model arrives in training mode with the weights the server sent.
        """
        raise TypeError(f"{type(self).__name__} does not define train_one")

    def train(self, ctx: Context) -> Upload:
        problem, model = ctx.problem, copy.deepcopy(ctx.problem.model)
        places = dict(model.named_parameters()) | dict(model.named_buffers())
        starts = ctx.start.expand(len(ctx.ids), -1)
        ends = starts.new_empty(len(ctx.ids), problem.layout.size)
        for i, (client, round) in enumerate(zip(ctx.ids.tolist(), ctx.rounds.tolist(), strict=True)):
            start = starts[i] if ctx.private is None else torch.cat([starts[i], ctx.private[i]])
            with torch.no_grad():
                for name, value in problem.named(start, ctx.buffers[i]).items():
                    places[name].copy_(value)
            generator = ctx.streams.torch("train_one", client, round)
            with torch.random.fork_rng(devices=[]):  # for code that draws from the global generator all the same
                torch.manual_seed(generator.initial_seed())
                ctx.loss[i] = self.train_one(model.train(), ctx.samples.of(client), ctx.message, float(ctx.lr), generator)
            ends[i] = problem.layout.flatten(places)
            ctx.buffers[i] = problem.buffer_layout.flatten(places)
        if ctx.private is not None:
            ctx.private.copy_(ends[:, problem.shared :])
        return ctx.upload(self.weigh(ctx), delta=ends[:, : problem.shared] - ctx.start)
