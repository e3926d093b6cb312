"""Gradients of many clients at once: ``[C, P]`` weights and a batch per client in, ``[C, P]`` gradients and ``[C]`` losses out.

Three ways to compute the same numbers, because no single one is fastest everywhere:

- ``Stacked``: chains of linear layers as batched matrix products with a hand-written backward pass. Best when overhead
  dominates; also offers the exact shortcuts of plain SGD (``descend``).
- ``Vmap``: any model, through ``torch.vmap``.
- ``Loop``: any model, one client at a time in plain autograd. Best when one client's step already fills a core (convolutions),
  and the only exact one where samples of a batch depend on each other (batch norm) and clients are ragged.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from hanse.core.dropout import dropout_key, with_keyed_dropout
from hanse.core.losses import cross_entropy, squared_error
from hanse.core.problem import Problem
from hanse.core.samples import Batch


Descend = Callable[[Tensor, Iterable[tuple[int, Batch]], list[int], float, Tensor], tuple[Tensor, Tensor]]
"""``(start [P], batches, steps per client, lr, weight [C]) -> (sum_i weight_i (w_i - start) [P], mean losses [C])`` of plain SGD."""


class Path(Protocol):
    """One way to compute gradients of the problem it was made for."""

    name: str
    descend: Descend | None

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        """``w`` ``[C, P]`` -> gradient ``[C, P]`` and mean loss ``[C]``; running statistics in ``buffers`` ``[C, Q]`` are updated."""
        ...


class Loop:
    """One client at a time on a module of this thread's own, channels-last, optionally with bfloat16 arithmetic."""

    name = "loop"
    descend = None

    def __init__(self, problem: Problem, bf16: bool = False) -> None:
        self.problem, self.bf16 = problem, bf16
        self._mine = threading.local()

    def _replica(self) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
        if not hasattr(self._mine, "module"):
            module = with_keyed_dropout(copy.deepcopy(self.problem.model)).train()
            if self.problem.start.dtype != torch.float64:
                module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            named = dict(module.named_parameters())
            trained = [named[e.name] for e in self.problem.layout.entries]
            for p in module.parameters():
                p.requires_grad_(False)
            for p in trained:
                p.requires_grad_(True)
            own = dict(module.named_buffers())
            self._mine.module = (module, trained, [own[e.name] for e in self.problem.buffer_layout.entries])
        replica: tuple[nn.Module, list[Tensor], list[Tensor]] = self._mine.module
        return replica

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        problem, (module, params, own) = self.problem, self._replica()
        gradient, losses = torch.empty_like(w), w.new_empty(len(w))
        into = list(problem.layout.views(gradient).values())
        source = list(problem.layout.views(w).values())
        stats = list(problem.buffer_layout.views(buffers).values())
        for i in range(len(w)):
            with torch.no_grad():
                torch._foreach_copy_(params, [v[i] for v in source])
                for mine, given in zip(own, stats, strict=True):
                    mine.copy_(given[i])
            x, y, weight = batch.x[i], batch.y[i], None if batch.weight is None else batch.weight[i]
            if weight is not None:
                n = int((weight > 0).sum())
                x, y = x[:n], y[:n]
            with torch.enable_grad(), dropout_key(batch.key[i]):
                # Autocast keeps cast weights until it is left, so it is entered anew for every step.
                with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
                    output = module(x)
                loss = problem.loss(output.to(w.dtype) if output.is_floating_point() else output, y).mean()
                grads = torch.autograd.grad(loss, params)
            torch._foreach_copy_([v[i] for v in into], list(grads))
            losses[i] = loss.detach()
            for mine, given in zip(own, stats, strict=True):
                given[i].copy_(mine)
        return gradient, losses


class Vmap:
    """All clients in one vectorised call of autograd."""

    name = "vmap"
    descend = None

    def __init__(self, problem: Problem, bf16: bool = False) -> None:
        self.problem, self.bf16 = problem, bf16
        self.module = with_keyed_dropout(copy.deepcopy(problem.model)).train()
        self._grad = vmap(grad_and_value(self._loss, has_aux=True), in_dims=(0, 0, 0, 0, 0, 0))
        self._grad_full = vmap(grad_and_value(self._loss, has_aux=True), in_dims=(0, 0, 0, 0, None, 0))

    def _loss(
        self, params: dict[str, Tensor], stats: dict[str, Tensor], x: Tensor, y: Tensor, weight: Tensor | None, key: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with dropout_key(key), torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            output = functional_call(self.module, {**params, **stats, **self.problem.fixed}, (x,))
        losses = self.problem.loss(output.to(self.problem.dtype), y)
        return losses.mean() if weight is None else (losses * weight).sum(), stats

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        stats = {n: v.clone() for n, v in self.problem.buffer_layout.views(buffers).items()}
        compute = self._grad_full if batch.weight is None else self._grad
        grads, (losses, stats) = compute(self.problem.layout.views(w), stats, batch.x, batch.y, batch.weight, batch.key)
        gradient = torch.empty_like(w)
        into = self.problem.layout.views(gradient)
        for name, g in grads.items():
            into[name].copy_(g)
        for name, v in self.problem.buffer_layout.views(buffers).items():
            v.copy_(stats[name])
        return gradient, losses.detach()


class Stacked:
    """Chains of linear layers and activations under cross-entropy or squared error."""

    name = "stacked"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.layers = linear_chain(problem) or []
        places = {e.name: e for e in problem.layout.entries}
        self.places = [(places[w], places.get(b)) for w, b, _ in self.layers]

    def _factors(self, w: Tensor, batch: Batch) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Forward and backward pass at ``w`` (``[P]`` shared by all, or ``[C, P]``).

        Returns ``(delta [C, B, out], input [C, B, in])`` of each layer, whose product is the layer's gradient, and losses ``[C]``.
        """
        x, y, weight, _ = batch
        clients, size = x.shape[:2]
        views = self.problem.layout.views(w)
        h = x.flatten(2)
        inputs: list[Tensor] = []
        for weights, bias, activation in self.layers:
            inputs.append(h)
            matrix = views[weights].transpose(-1, -2)
            if w.dim() == 1:
                flat = h.reshape(clients * size, -1)
                h = (torch.addmm(views[bias], flat, matrix) if bias in views else flat @ matrix).view(clients, size, -1)
            else:
                h = torch.baddbmm(views[bias].unsqueeze(1), h, matrix) if bias in views else torch.bmm(h, matrix)
            if activation is not None:
                h = activation(h)
        if self.problem.loss is cross_entropy:
            log_p = h.log_softmax(-1)
            label = y.unsqueeze(-1)
            each = -log_p.gather(-1, label).squeeze(-1)
            delta = log_p.exp_().scatter_add_(-1, label, torch.full_like(label, -1, dtype=h.dtype))
        else:
            miss = h - y.reshape(h.shape)
            each = miss.square().mean(-1)
            delta = miss.mul_(2 / h.shape[-1])
        if weight is None:
            losses, delta = each.mean(1), delta.div_(size)
        else:
            losses, delta = (each * weight).sum(1), delta.mul_(weight.unsqueeze(-1))
        found: list[tuple[Tensor, Tensor]] = []
        for i in range(len(self.layers) - 1, -1, -1):
            found.append((delta, inputs[i]))
            if i:
                matrix = views[self.layers[i][0]]
                back = (delta.reshape(clients * size, -1) @ matrix).view(clients, size, -1) if w.dim() == 1 else torch.bmm(delta, matrix)
                h = inputs[i]
                delta = back.mul_(h > 0) if self.layers[i - 1][2] is torch.relu_ else back.mul_(1 - h * h)
        return found[::-1], losses

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        factors, losses = self._factors(w, batch)
        gradient = torch.empty_like(w)
        for (weights, bias), (delta, h) in zip(self.places, factors, strict=True):
            into = gradient[:, weights.start : weights.start + weights.size].view(len(w), *weights.shape)
            if len(w) == 1:
                torch.bmm(delta.transpose(1, 2), h, out=into)
            else:  # a batched product into strided memory falls back to one call per client; a contiguous one and a copy do not
                into.copy_(torch.bmm(delta.transpose(1, 2), h))
            if bias:
                torch.sum(delta, 1, out=gradient[:, bias.start : bias.start + bias.size])
        return gradient, losses

    def descend(
        self, start: Tensor, batches: Iterable[tuple[int, Batch]], lengths: list[int], lr: float, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Plain SGD from one vector ``start`` ``[P]``; returns ``sum_i weight_i (w_i - start)`` ``[P]`` and mean losses ``[C]``.

        Two exact shortcuts: the first step reads ``start`` itself (one large product, no copies), and a client's last step goes
        straight into the sum, so that a single-step round never makes C models.
        """
        clients = len(lengths)
        total = torch.zeros_like(start)
        losses = start.new_zeros(clients)
        w: Tensor | None = None
        for k, (active, batch) in enumerate(batches):
            going = sum(length > k + 1 for length in lengths)  # clients are sorted: the first ``going`` have more to do
            factors, loss = self._factors(start if w is None else w[:active], batch)
            losses[:active] += loss
            if going < active:
                share = weight[going:active]
                if w is not None:
                    total.addmv_(w[going:active].t(), share).sub_(start, alpha=float(share.sum()))
                self._subtract(total, factors, slice(going, active), lr, share)
            if going:
                w = start.repeat(going, 1) if w is None else w[:going]
                self._subtract(w, factors, slice(0, going), lr, None)
        return total, losses / torch.tensor(lengths, device=losses.device)

    def _subtract(self, target: Tensor, factors: list[tuple[Tensor, Tensor]], part: slice, lr: float, share: Tensor | None) -> None:
        """``target -= lr * gradient`` of the clients in ``part``, by row, or weighted by ``share`` into one vector."""
        for (weights, bias), (delta, h) in zip(self.places, factors, strict=True):
            delta, h = delta[part], h[part]
            into = target[..., weights.start : weights.start + weights.size].view(*target.shape[:-1], *weights.shape)
            if share is not None:
                flat = (delta * share[:, None, None]).flatten(0, 1)
                into.addmm_(flat.t(), h.flatten(0, 1), alpha=-lr)
                step = flat.sum(0)
            else:
                if len(target) == 1:
                    into.baddbmm_(delta.transpose(1, 2), h, alpha=-lr)
                else:
                    into.add_(torch.bmm(delta.transpose(1, 2), h), alpha=-lr)
                step = delta.sum(1)
            if bias:
                target[..., bias.start : bias.start + bias.size].sub_(step, alpha=lr)


def linear_chain(problem: Problem) -> list[tuple[str, str, object]] | None:
    """``(weight, bias, activation)`` of each layer if the model is a chain that ``Stacked`` can run, else None."""
    if not isinstance(problem.model, nn.Sequential) or problem.fixed or problem.loss not in (cross_entropy, squared_error):
        return None
    layers: list[tuple[str, str, object]] = []
    for name, part in problem.model.named_children():
        if type(part) is nn.Linear:
            layers.append((f"{name}.weight", f"{name}.bias", None))
        elif type(part) in (nn.ReLU, nn.Tanh) and layers and layers[-1][2] is None:
            layers[-1] = (*layers[-1][:2], torch.relu_ if type(part) is nn.ReLU else torch.tanh_)
        elif not (type(part) is nn.Flatten and not layers and part.start_dim == 1 and part.end_dim == -1):
            return None
    return layers if layers and layers[-1][2] is None else None


def paths(problem: Problem, bf16: bool = False) -> dict[str, Path]:
    """Every path that computes this problem's gradients exactly, by name."""
    coupled = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in problem.model.modules())
    found: dict[str, Path] = {"loop": Loop(problem, bf16)}
    if not coupled:
        found["vmap"] = Vmap(problem, bf16)
    if not bf16 and linear_chain(problem):
        found["stacked"] = Stacked(problem)
    return found
