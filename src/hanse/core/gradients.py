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
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from hanse.core.dropout import dropout_at, with_keyed_dropout
from hanse.core.losses import cross_entropy, squared_error
from hanse.core.problem import Problem
from hanse.core.samples import Batch

Descend = Callable[[Tensor, Tensor, Iterable[tuple[int, Batch]], Tensor, float, Tensor], Tensor]
"""Plain SGD: ``(total [P], start [P], batches, steps per client, lr, weight [C])`` adds ``sum_i weight_i (w_i - start)``
to ``total`` and returns the mean losses ``[C]``."""


class GradientPath(Protocol):
    """One way to compute gradients of the problem it was made for."""

    name: str
    descend: Descend | None

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        """``w`` ``[C, P]`` -> gradient ``[C, P]`` and mean loss ``[C]``; running statistics ``buffers`` ``[C, Q]`` are updated."""
        ...

    def losses(self, w: Tensor, batch: Batch, buffers: Tensor) -> Tensor:
        """Mean losses ``[C]`` at ``w`` ``[C, P]`` as at inference: no gradient, no dropout, statistics are used and left alone."""
        ...


class Replica(NamedTuple):
    """A module of one thread's own: its trained parameters, its statistics in layout order, and its batch-norm layers."""

    module: nn.Module
    params: list[Tensor]
    stats: list[Tensor]
    norms: list[nn.modules.batchnorm._BatchNorm]


class Loop:
    """One client at a time on a module of this thread's own, channels-last, optionally with bfloat16 arithmetic."""

    name = "loop"
    descend: Descend | None = None

    def __init__(self, problem: Problem, bf16: bool = False) -> None:
        self.problem, self.bf16 = problem, bf16
        self._mine = threading.local()

    def _replica(self) -> Replica:
        if not hasattr(self._mine, "replica"):
            module = own_module(self.problem)
            if self.problem.start.dtype != torch.float64 and all(p.dim() <= 4 for p in module.parameters()):
                module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            named = dict(module.named_parameters())
            trained: list[Tensor] = [named[e.name] for e in self.problem.layout.entries]
            for p in module.parameters():
                p.requires_grad_(False)
            for tensor in trained:
                tensor.requires_grad_(True)
            own = dict(module.named_buffers())
            stats = [own[e.name] for e in self.problem.buffer_layout.entries]
            norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            self._mine.replica = Replica(module, trained, stats, norms)
        replica: Replica = self._mine.replica
        return replica

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        problem, (module, params, own, norms) = self.problem, self._replica()
        gradient, losses = torch.empty_like(w), w.new_empty(len(w))
        into = list(problem.layout.views(gradient).values())
        source = list(problem.layout.views(w).values())
        stats = list(problem.buffer_layout.views(buffers).values())
        for i in range(len(w)):
            with torch.no_grad():
                torch._foreach_copy_(params, [v[i] for v in source])
                for mine, given in zip(own, stats, strict=True):
                    mine.copy_(given[i])
            x, y = of_client(batch, i)
            for norm in norms:
                norm.train(len(x) > 1)  # one sample has no statistics of its own: it is normalised by the running ones
            with torch.enable_grad(), dropout_at(batch.ids[i], batch.rounds[i], batch.step, batch.seed):
                loss = self._loss(module, x, y)
                grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            torch._foreach_copy_([v[i] for v in into], list(grads))
            losses[i] = loss.detach()
            for mine, given in zip(own, stats, strict=True):
                given[i].copy_(mine)
        return gradient, losses

    @torch.no_grad()
    def losses(self, w: Tensor, batch: Batch, buffers: Tensor) -> Tensor:
        problem, (module, params, own, _) = self.problem, self._replica()
        losses = w.new_empty(len(w))
        source, stats = [*problem.layout.views(w).values()], [*problem.buffer_layout.views(buffers).values()]
        with evaluating(module):
            for i in range(len(w)):
                torch._foreach_copy_([*params, *own], [v[i] for v in (*source, *stats)])
                losses[i] = self._loss(module, *of_client(batch, i))
        return losses

    def _loss(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        # Autocast keeps cast weights until it is left, so it is entered anew for every step.
        with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            output = module(x)
        return self.problem.loss(output.to(self.problem.dtype) if output.is_floating_point() else output, y).mean()


class Vmap:
    """All clients in one vectorised call of autograd on a module of this thread's own."""

    name = "vmap"
    descend: Descend | None = None

    def __init__(self, problem: Problem, bf16: bool = False) -> None:
        self.problem, self.bf16 = problem, bf16
        self._mine = threading.local()  # functional_call swaps a module's tensors in place, so threads cannot share one
        self._grad = vmap(grad_and_value(self._loss, has_aux=True), in_dims=(0, 0, 0, 0, 0, 0, 0, None, None))
        self._grad_full = vmap(grad_and_value(self._loss, has_aux=True), in_dims=(0, 0, 0, 0, None, 0, 0, None, None))
        self._losses = vmap(self._loss, in_dims=(0, 0, 0, 0, 0, 0, 0, None, None))
        self._losses_full = vmap(self._loss, in_dims=(0, 0, 0, 0, None, 0, 0, None, None))

    def _prepare(self) -> nn.Module:
        if not hasattr(self._mine, "module"):
            self._mine.module = own_module(self.problem)
        module: nn.Module = self._mine.module
        return module

    def _loss(
        self,
        params: dict[str, Tensor],
        stats: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
        client: Tensor,
        round: Tensor,
        step: int,
        seed: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with (
            dropout_at(client, round, step, seed),
            torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext(),
        ):
            output = functional_call(self._mine.module, {**params, **stats, **self.problem.fixed}, (x,))
        losses = self.problem.loss(output.to(self.problem.dtype), y)
        return losses.mean() if weight is None else (losses * weight.to(losses.dtype)).sum(), stats

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        self._prepare()
        stats = {n: v.clone() for n, v in self.problem.buffer_layout.views(buffers).items()}
        compute = self._grad_full if batch.weight is None else self._grad
        grads, (losses, stats) = compute(self.problem.layout.views(w), stats, *batch)
        gradient = torch.empty_like(w)
        into = self.problem.layout.views(gradient)
        for name, g in grads.items():
            into[name].copy_(g)
        for name, v in self.problem.buffer_layout.views(buffers).items():
            v.copy_(stats[name])
        return gradient, losses.detach()

    @torch.no_grad()
    def losses(self, w: Tensor, batch: Batch, buffers: Tensor) -> Tensor:
        compute = self._losses_full if batch.weight is None else self._losses
        with evaluating(self._prepare()):
            losses, _ = compute(self.problem.layout.views(w), self.problem.buffer_layout.views(buffers), *batch)
        found: Tensor = losses
        return found


class Stacked:
    """Chains of linear layers and activations under cross-entropy or squared error."""

    name = "stacked"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.layers = linear_chain(problem) or []
        self.descend: Descend | None = self._descend

    def _factors(self, w: Tensor, batch: Batch) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Forward and backward pass at ``w`` (``[P]`` shared by all, or ``[C, P]``).

        Returns ``(delta [C, B, out], input [C, B, in])`` of each layer, whose product is the layer's gradient, and losses ``[C]``.
        """
        weight, (clients, size) = batch.weight, batch.x.shape[:2]
        if len(w) == 1:  # one large matrix is faster as itself than as a batch of one
            w = w[0]
        shared, views = w.dim() == 1, self.problem.layout.views(w)
        h, inputs = self._forward(views, batch.x, shared)
        each, delta = self._loss(h, batch.y)
        if weight is None:
            losses, delta = each.mean(1), delta.div_(size)
        else:
            losses, delta = (each * weight).sum(1), delta.mul_(weight.unsqueeze(-1))
        deltas = [delta]
        for i in range(len(self.layers) - 1, 0, -1):
            here = views[self.layers[i][0]]
            delta = (delta.view(clients * size, -1) @ here).view(clients, size, -1) if shared else torch.bmm(delta, here)
            activation = self.layers[i - 1][2]
            if activation:
                delta = activation.backward_(delta, inputs[i])
            deltas.append(delta)
        return list(zip(deltas[::-1], inputs, strict=True)), losses

    def _forward(self, views: dict[str, Tensor], x: Tensor, shared: bool) -> tuple[Tensor, list[Tensor]]:
        """Outputs ``[C, B, out]`` and the inputs of the layers."""
        (clients, size), h = x.shape[:2], x.flatten(2)
        inputs: list[Tensor] = []
        for matrix, bias, activation in self.layers:
            inputs.append(h)
            turned = views[matrix].transpose(-1, -2)
            if shared:
                flat = h.reshape(clients * size, -1)
                h = (torch.addmm(views[bias], flat, turned) if bias else flat @ turned).view(clients, size, -1)
            else:
                h = torch.baddbmm(views[bias].unsqueeze(1), h, turned) if bias else torch.bmm(h, turned)
            if activation:
                h = activation.forward_(h)
        return h, inputs

    @torch.no_grad()
    def losses(self, w: Tensor, batch: Batch, buffers: Tensor) -> Tensor:
        h, _ = self._forward(self.problem.layout.views(w), batch.x, shared=False)
        each, _ = self._loss(h, batch.y)
        return each.mean(1) if batch.weight is None else (each * batch.weight).sum(1)

    def _loss(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss ``[C, B]`` and its derivative by the output ``h`` ``[C, B, out]``, which may be overwritten."""
        if self.problem.loss is squared_error:
            miss = h.sub_(y.view(h.shape))
            return miss.square().mean(-1), miss.mul_(2 / h.shape[-1])
        # Spelled out: torch's log_softmax takes eight times as long when the number of classes is no multiple of the vector width.
        label = y.unsqueeze(-1)
        h.sub_(h.amax(-1, keepdim=True))
        own = h.gather(-1, label)
        total = h.exp_().sum(-1, keepdim=True)
        delta = h.div_(total).scatter_add_(-1, label, torch.full_like(own, -1))
        return total.log_().sub_(own).squeeze(-1), delta

    def grad(self, w: Tensor, batch: Batch, buffers: Tensor) -> tuple[Tensor, Tensor]:
        factors, losses = self._factors(w, batch)
        gradient = torch.empty_like(w)
        into = self.problem.layout.views(gradient)
        for (matrix, bias, _), (delta, h) in zip(self.layers, factors, strict=True):
            if len(w) == 1:
                torch.mm(delta[0].t(), h[0], out=into[matrix][0])
            else:  # a batched product into strided memory falls back to one call per client; a contiguous one and a copy do not
                into[matrix].copy_(torch.bmm(delta.transpose(1, 2), h))
            if bias:
                torch.sum(delta, 1, out=into[bias])
        return gradient, losses

    def _descend(
        self,
        total: Tensor,
        start: Tensor,
        batches: Iterable[tuple[int, Batch]],
        lengths: Tensor,
        lr: float,
        weight: Tensor,
    ) -> Tensor:
        """Two exact shortcuts: the first step reads ``start`` itself (one large product, no copies), and a client's last step goes
        straight into the sum, so that a single-step round never makes C models.
        """
        losses, ends = start.new_zeros(len(lengths)), lengths.numpy()
        w: Tensor | None = None
        with torch.inference_mode():  # total and losses live outside; everything in between is cheaper inside
            for k, (active, batch) in enumerate(batches):
                going = int((ends > k + 1).sum())  # clients are sorted: the first ``going`` have more to do
                factors, loss = self._factors(start if w is None else w[:active], batch)
                losses[:active] += loss
                if going < active:
                    share = weight[going:active]
                    if w is not None:
                        total.addmv_(w[going:active].t(), share).sub_(start, alpha=float(share.sum()))
                    self._step_sum(total, [(d[going:], h[going:]) for d, h in factors] if going else factors, lr, share)
                if going:
                    w = start.repeat(going, 1) if w is None else w[:going]
                    self._step_rows(w, [(d[:going], h[:going]) for d, h in factors] if going < active else factors, lr)
        return losses.div_(lengths.to(losses.device))

    def _step_rows(self, w: Tensor, factors: list[tuple[Tensor, Tensor]], lr: float) -> None:
        """``w -= lr * gradient``, row by row."""
        into = self.problem.layout.views(w)
        for (matrix, bias, _), (delta, h) in zip(self.layers, factors, strict=True):
            if len(w) == 1:
                into[matrix][0].addmm_(delta[0].t(), h[0], alpha=-lr)
            else:
                into[matrix].add_(torch.bmm(delta.transpose(1, 2), h), alpha=-lr)
            if bias:
                into[bias].sub_(delta.sum(1), alpha=lr)

    def _step_sum(self, total: Tensor, factors: list[tuple[Tensor, Tensor]], lr: float, share: Tensor) -> None:
        """``total -= lr * sum_i share_i gradient_i``: one product over all clients."""
        into = self.problem.layout.views(total)
        for (matrix, bias, _), (delta, h) in zip(self.layers, factors, strict=True):
            flat = (delta * share.view(-1, 1, 1)).flatten(0, 1)
            into[matrix].addmm_(flat.t(), h.flatten(0, 1), alpha=-lr)
            if bias:
                into[bias].sub_(flat.sum(0), alpha=lr)


class Activation(NamedTuple):
    """An activation in place, and its backward pass from the incoming gradient, which it may overwrite, and the output."""

    forward_: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation(torch.relu_, lambda g, out: torch.ops.aten.threshold_backward(g, out, 0)),
    nn.Tanh: Activation(torch.tanh_, lambda g, out: g.mul_(1 - out * out)),
    nn.Sigmoid: Activation(torch.sigmoid_, lambda g, out: g.mul_(out * (1 - out))),
}

Layer = tuple[str, str | None, Activation | None]


def own_module(problem: Problem) -> nn.Module:
    """A module to train in, with dropout by keys."""
    return with_keyed_dropout(problem.copy()).train()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have a module as at inference."""
    module.eval()
    try:
        yield
    finally:
        module.train()


def of_client(batch: Batch, i: int) -> tuple[Tensor, Tensor]:
    """The samples of the i-th client, without padding."""
    x, y = batch.x[i], batch.y[i]
    if batch.weight is None:
        return x, y
    n = int((batch.weight[i] > 0).sum())
    return x[:n], y[:n]


def linear_chain(problem: Problem) -> list[Layer] | None:
    """``(weight, bias, activation)`` of each layer if the model is a chain that ``Stacked`` can run, else None."""
    if type(problem.model) is not nn.Sequential or problem.fixed or problem.loss not in (cross_entropy, squared_error):
        return None
    own = {e.name for e in problem.layout.entries}
    layers: list[Layer] = []
    for name, part in problem.model._modules.items():  # named_children would leave out a module's second appearance
        if type(part) is nn.Linear and own.issuperset(f"{name}.{n}" for n, _ in part.named_parameters()):
            layers.append((f"{name}.weight", None if part.bias is None else f"{name}.bias", None))
        elif type(part) in ACTIVATIONS and layers and layers[-1][2] is None:
            layers[-1] = (*layers[-1][:2], ACTIVATIONS[type(part)])
        elif not (type(part) is nn.Flatten and not layers and part.start_dim == 1 and part.end_dim == -1):
            return None
    return layers if layers and layers[-1][2] is None else None


def paths(problem: Problem, bf16: bool = False) -> dict[str, GradientPath]:
    """Every path that computes this problem's gradients exactly, by name."""
    coupled = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in problem.model.modules())
    found: dict[str, GradientPath] = {"loop": Loop(problem, bf16)}
    if not coupled and vectorises(problem):
        found["vmap"] = Vmap(problem, bf16)
    if not bf16 and linear_chain(problem):
        found["stacked"] = Stacked(problem)
    return found


def vectorises(problem: Problem) -> bool:
    """Whether ``torch.vmap`` can run the model; it cannot where what is computed depends on the values of inputs."""
    if problem.sample is None:
        return True
    try:
        problem.outputs(
            problem.start.expand(2, -1), problem.start_buffers.expand(2, -1), problem.sample.expand(2, *problem.sample.shape)
        )
    except RuntimeError:
        return False
    return True
