"""What a rule's client code sees: some clients side by side, axis 0 = client."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hanse.core.gradients import GradientPath
from hanse.core.messages import Tensors, Upload
from hanse.core.optim import Optimizer, Slots
from hanse.core.problem import Problem
from hanse.core.samples import Batch, Plan, Samples
from hanse.core.streams import Streams

Direction = Callable[["Context", Tensor, Batch], Tensor]
"""``(ctx, w [C, P], batch) -> [C, P]``: one local step's direction; the optimiser then moves against it."""


@dataclass
class Context:
    """The work of C clients, side by side.

    ``rounds`` ``[C]`` names each client's work: all its chance is drawn for it. ``steps`` ``[C]`` are its local steps, never rising
    along C. ``message``: what the server sent, the same to all, or, if ``mixed``, a row a client, because they started from
    different versions. ``state``: what these clients keep, ``[C, ...]``; what the rule writes there is kept. ``totals``: where
    nobody needs single clients' sums, the running sums over clients so far, to which ``train`` may add by itself. ``tests``: all
    clients' own test samples, for work that measures models on them.
    """

    problem: Problem
    path: GradientPath
    samples: Samples
    streams: Streams
    ids: Tensor
    rounds: Tensor
    steps: Tensor
    message: Tensors
    mixed: bool
    state: Tensors
    plan: Plan
    lr: float | Tensor
    local: Optimizer
    clip: float | None = None
    totals: Tensors | None = None
    tests: Samples | None = None
    buffers: Tensor = field(init=False)
    private: Tensor | None = field(init=False)
    loss: Tensor = field(init=False)
    _lengths: Tensor = field(init=False)
    _first_pass: bool = True
    _private_gradient: Tensor | None = None

    def __post_init__(self) -> None:
        counts = self.samples.counts(self.ids)
        self.counts, self._lengths, self.steps = counts.to(self.problem.device), self.steps, self.steps.to(self.problem.device)
        problem, everyone = self.problem, len(self.ids)
        self.private = self.state.get("private")
        buffers = self.state.get("buffers", self.message.get("buffers", problem.start_buffers))
        if "buffers" not in self.state:  # the server's, one for all or one a domain
            if problem.shared_buffers.dim() > 1:
                own = torch.arange(everyone, device=problem.device)
                buffers = buffers[own, self.domain] if self.mixed else buffers[self.domain]
            else:
                buffers = buffers.expand(everyone, -1)
                buffers = buffers.clone() if buffers.numel() else buffers
        self.buffers = buffers
        self.loss = torch.zeros(everyone, dtype=problem.dtype, device=problem.device)

    @property
    def domain(self) -> Tensor:
        """The domain of each client, ``[C]``."""
        assert self.samples.domains is not None
        return self.samples.domains[self.ids].to(self.problem.device)

    @property
    def start(self) -> Tensor:
        """The model the clients start from, ``[P]``, or ``[C, P]`` if ``mixed``."""
        return self.message["x"]

    def grad(self, w: Tensor, batch: Batch) -> Tensor:
        """Gradient of every client's mean batch loss at ``w`` ``[C, P]``, clipped to norm ``clip`` if that is set.

        Only the first call in a step counts towards the reported loss and the running statistics, so a second evaluation
        (at a perturbed or an older point) leaves both alone.
        """
        full = w if self.private is None else torch.cat([w, self.private[: len(w)]], 1)
        buffers = self.buffers if self._first_pass else self.buffers.clone()
        g, loss = self.path.grad(full, batch, buffers)
        if self.clip is not None:
            g = g * (self.clip / g.norm(dim=1, keepdim=True)).clamp(max=1)
        if self.private is not None:
            g, private_gradient = g[:, : w.shape[1]].contiguous(), g[:, w.shape[1] :]
        if self._first_pass:
            self._first_pass = False
            self.loss += loss
            if self.private is not None:
                self._private_gradient = private_gradient
        return g

    def losses(self, w: Tensor, batch: Batch) -> Tensor:
        """Mean batch loss ``[C]`` at ``w`` ``[C, P]`` as at inference, without any gradient: for rules that only look."""
        full = w if self.private is None else torch.cat([w, self.private[: len(w)]], 1)
        return self.path.losses(full, batch, self.buffers)

    def first(self, active: int) -> Context:
        """The same work, seen by its first ``active`` clients; memory is shared."""
        part = copy.copy(self)
        part.ids, part.counts, part.steps = self.ids[:active], self.counts[:active], self.steps[:active]
        part.rounds, part._lengths = self.rounds[:active], self._lengths[:active]
        part.lr = self.lr[:active] if isinstance(self.lr, Tensor) else self.lr
        part.message = {n: t[:active] for n, t in self.message.items()} if self.mixed else self.message
        part.loss, part.buffers = self.loss[:active], self.buffers[:active]
        part.private = None if self.private is None else self.private[:active]
        part.state = {n: t[:active] for n, t in self.state.items()}
        return part

    def pick(self, which: Tensor) -> Context:
        """The work of some of the clients, ``which`` bool ``[C]``, as their own: write back what is to stay."""
        at = which.nonzero().squeeze(1)
        part = copy.copy(self)
        part.ids, part.rounds, part._lengths = self.ids[at.cpu()], self.rounds[at.cpu()], self._lengths[at.cpu()]
        part.counts, part.steps, part.loss, part.buffers = self.counts[at], self.steps[at], self.loss[at], self.buffers[at]
        part.lr = self.lr[at] if isinstance(self.lr, Tensor) else self.lr
        part.message = {n: t[at] for n, t in self.message.items()} if self.mixed else self.message
        part.state = {n: t[at] for n, t in self.state.items()}
        part.private = part.state.get("private")
        part.totals = None
        return part

    def large_gradient(self, w: Tensor, batch: int | None = None) -> Tensor:
        """Gradient at ``w`` ``[C, P]`` over ``batch`` samples of each client drawn without repetition, or over all it has."""
        plan = Plan(batch or int(self.counts.max()), shuffle=batch is not None)
        ((_, large),) = plan.batches(self.samples, self.ids, self.streams, self.rounds, torch.ones_like(self._lengths))
        self._first_pass = True
        return self.grad(w, large)

    def batches(self) -> Iterator[tuple[Context, Batch]]:
        """Every local step: the work of those who still have something to do, and their batch."""
        view = self
        for active, batch in self.plan.batches(self.samples, self.ids, self.streams, self.rounds, self._lengths):
            if active != len(view.ids):
                view = self.first(active)
            view._first_pass = True
            yield view, batch

    def descend(self, direction: Direction, slots: Slots | None = None) -> Tensor:
        """Take all local steps from ``start``; returns the end points ``[C, P]``.

        ``slots`` are what the optimiser remembers, ``[C, ...]`` each, changed in place; None: nothing yet.
        """
        clients, size = len(self.ids), self.start.shape[-1]
        w = self.start.expand(clients, size).clone()
        slots = self.local.slots(w) if slots is None else slots
        own = {} if self.private is None else self.local.slots(self.private)
        for view, batch in self.batches():
            here = w[: len(view.ids)]
            self._move(here, direction(view, here, batch), slots)
            if view.private is not None and view._private_gradient is not None:
                self._move(view.private, view._private_gradient, own)
        self.loss /= self.steps.clamp(min=1)
        return w

    def _move(self, x: Tensor, d: Tensor, slots: Slots) -> None:
        """One step of the local optimiser against ``d``, in place; ``slots`` may have further rows."""
        if not self.local.plain:
            d = self.local.direction(d, {n: s[: len(x)] for n, s in slots.items()}, x)
        if isinstance(self.lr, Tensor):
            x.addcmul_(d, self.lr[: len(x)], value=-1)
        else:
            x.add_(d, alpha=-self.lr)

    def displacement(self, direction: Direction) -> Tensor:
        """``w_K - start`` of every client, ``[C, P]``."""
        return self.descend(direction).sub_(self.start)

    def total_displacement(self, weight: Tensor) -> Tensor | None:
        """``sum_i weight_i (w_iK - start)`` ``[P]`` of plain gradient descent by the exact shortcuts, added to ``totals["delta"]``;
        None where they do not apply.
        """
        if self.totals is None or self.path.descend is None or not self.local.plain:
            return None
        if self.clip is not None or self.private is not None or isinstance(self.lr, Tensor) or self.mixed:
            return None
        if "delta" not in self.totals:
            self.totals["delta"] = torch.zeros_like(self.start)
        total = self.totals["delta"]
        batches = self.plan.batches(self.samples, self.ids, self.streams, self.rounds, self._lengths)
        self.loss = self.path.descend(total, self.start, batches, self._lengths, self.lr, weight)
        return total

    def upload(self, weight: Tensor, rows: Tensors | None = None, senders: Tensors | None = None, **sums: Tensor) -> Upload:
        """Declare what the server may see: ``sums`` weighted by ``weight`` ``[C]``, and ``rows``; ``senders[name]`` bool ``[C]``
        are those who send ``name``, if not all do.
        """
        rows, clients, known = rows or {}, len(self.ids), self.totals or {}
        for name, values in sums.items():
            if values is not known.get(name):
                sums[name] = values.reshape(clients, -1)  # one number a client is a vector of length one
        if "buffers" in self.message and self.problem.shared_buffers.dim() == 1:
            sums["buffers"] = self.buffers
        elif "buffers" in self.message:
            rows |= {"buffers": self.buffers, "domain": self.domain}
        return Upload(self.ids, weight, sums, rows, senders or {}, self.loss)
