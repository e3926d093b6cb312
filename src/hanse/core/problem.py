"""A problem: a model, its loss and its metrics as functions of flat vectors.

The module is only a recipe. Its trainable numbers are one vector ``w`` of length P whose first ``shared`` entries travel
between server and clients and whose rest is private to a client; its buffers (batch-norm statistics) are a second vector;
frozen tensors are held once, whatever the number of clients.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from hanse.core.errors import ConfigError
from hanse.core.layout import Layout, select
from hanse.core.losses import PerSample, accuracy, cross_entropy
from hanse.core.samples import Samples

EVALUATION_CHUNK = 512
"""Samples per forward pass of an evaluation; large enough to be efficient, small enough for activations to fit."""

_SWAPPING = threading.Lock()
"""A functional call puts its tensors into the module for as long as it takes, so threads take turns."""


class Problem:
    """``model`` with ``loss`` and ``metrics`` (functions of output and label, one number per sample).

    ``private`` and ``frozen`` are selections: name patterns or module types (see ``layout.select``). ``buffers`` says what becomes
    of the clients' batch-norm statistics: averaged like the model (``domains`` 0), averaged within each of so many domains, or
    private to each client. ``sample`` ``[1, ...]`` of zeros has the shape and type of the inputs, where they are known.
    Raises ``ConfigError`` when nothing trainable is left or a selection matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerSample = cross_entropy,
        metrics: Mapping[str, PerSample] | None = None,
        *,
        private: Sequence[str] = (),
        frozen: Sequence[str] = (),
        buffers: Literal["average", "domain", "private"] = "average",
        domains: int = 0,
        sample: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = copy.deepcopy(model).to(device=device, dtype=dtype)
        self.loss, self.sample, self.device, self.dtype = loss, sample, torch.device(device), dtype
        self.metrics: dict[str, PerSample] = {"accuracy": accuracy} if metrics is None else dict(metrics)
        own, held = select(self.model, private), select(self.model, frozen)
        held |= {n for n, p in self.model.named_parameters() if not p.requires_grad}
        trained = {n: p for n, p in self.model.named_parameters() if n not in held}
        if not trained:
            raise ConfigError(f"frozen: {list(frozen)} leaves no trainable parameter")
        order = [n for n in trained if n not in own] + [n for n in trained if n in own]
        self.layout = Layout({n: trained[n].shape for n in order})
        self.shared = sum(trained[n].numel() for n in order if n not in own)
        self.shared_layout = Layout({n: trained[n].shape for n in order if n not in own})
        """The part of the layout that is shared."""
        norms = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
        if any(m.track_running_stats and m.momentum is None for m in norms.values()):
            raise ConfigError("batch norm: momentum=None is not allowed: an average over all batches depends on their order")
        running = {f"{n}.{kind}" for n in norms for kind in ("running_mean", "running_var")}
        stats = {n: b for n, b in self.model.named_buffers() if n in running and n not in held}
        self.buffer_layout = Layout({n: b.shape for n, b in stats.items()})
        self.shares_buffers = bool(stats) and buffers != "private"
        if buffers == "domain" and not domains:
            raise ConfigError("buffers: 'domain' is not allowed: the partition knows no domains; feature_shift does")
        self.fixed = {
            n: t.detach()
            for n, t in [*self.model.named_parameters(), *self.model.named_buffers()]
            if n not in trained and n not in stats
        }
        self.start = self.layout.flatten(trained)
        for name, view in self.layout.views(self.start).items():
            trained[name].data = view  # the recipe's own weights need no memory of their own
        self.start_buffers = self.buffer_layout.flatten(stats).to(self.device, dtype)
        self.shared_buffers = self.start_buffers.repeat(domains, 1) if buffers == "domain" else self.start_buffers
        """What the server holds at first: ``[Q]``, or one row a domain ``[domains, Q]``."""

    def layout_of(self, name: str, width: int) -> Layout:
        """The layout of vectors as wide as what is shared of the model is that one's, else none in particular."""
        return self.shared_layout if width == self.shared_layout.size else Layout({name: (width,)})

    def named(self, w: Tensor, buffers: Tensor) -> dict[str, Tensor]:
        """All tensors of the module: views of ``w`` and ``buffers`` and the frozen ones."""
        return {**self.layout.views(w), **self.buffer_layout.views(buffers), **self.fixed}

    def vectors(self, named: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``w`` ``[P]`` and ``buffers`` ``[Q]`` of tensors by name; buffers that not all have in common are those at the start."""
        alike = self.shares_buffers and self.shared_buffers.dim() == 1
        return self.layout.flatten(named), self.buffer_layout.flatten(named) if alike else self.start_buffers

    def output(self, w: Tensor, buffers: Tensor, x: Tensor, training: bool = False) -> Tensor:
        """The model's output at the vector ``w`` ``[P]``."""
        self.model.train(training)
        out: Tensor = functional_call(self.model, self.named(w, buffers), (x,))
        return out

    def copy(self) -> nn.Module:
        """A module like the recipe, with trained parameters and buffers of its own; frozen parameters are shared."""
        return copy.deepcopy(self.model, {id(p): p for n, p in self.model.named_parameters() if n in self.fixed})

    def module(self, w: Tensor, buffers: Tensor) -> nn.Module:
        """The model at ``w`` ``[P]``, as a module for inference: to be saved, or used by whoever knows modules."""
        module, named = self.copy().eval(), {**self.layout.views(w), **self.buffer_layout.views(buffers)}
        with torch.no_grad():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if name in named:
                    tensor.copy_(named[name])
        return module

    def sample_flops(self, x: Tensor) -> float:
        """Floating-point operations to train on one sample like ``x`` ``[1, ...]``: three forward passes' worth of matrix work."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.output(self.start, self.start_buffers, x)
        return 3.0 * max(float(counter.get_total_flops()), 2.0 * self.layout.size)

    @torch.no_grad()
    def outputs(self, w: Tensor, buffers: Tensor, x: Tensor) -> Tensor:
        """The outputs ``[M, B, ...]`` of M models ``w`` ``[M, P]`` with statistics ``buffers`` ``[M, Q]``, each on its own samples.

        ``x`` ``[M, B, ...]`` are these samples. Under a further ``vmap`` over ``w``, what does not depend on it is computed once.
        """
        forward = vmap(lambda w, buffers, x: functional_call(self.model, self.named(w, buffers), (x,)))
        with _SWAPPING:
            self.model.eval()
            out: Tensor = forward(w, buffers, x)
        return out

    @torch.no_grad()
    def scores(self, w: Tensor, buffers: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Loss and metrics of every sample, each ``[N]``, without gradients."""
        parts: dict[str, list[Tensor]] = {}
        for i in range(0, len(x), EVALUATION_CHUNK):
            xs, ys = x[i : i + EVALUATION_CHUNK], y[i : i + EVALUATION_CHUNK]
            output = self.output(w, buffers, xs)
            for name, score in {"loss": self.loss, **self.metrics}.items():
                parts.setdefault(name, []).append(score(output, ys))
        return {name: torch.cat(values) for name, values in parts.items()}

    def evaluate(self, w: Tensor, buffers: Tensor, x: Tensor, y: Tensor) -> dict[str, float]:
        """Mean loss and metrics over the samples."""
        return {name: float(v.double().mean()) for name, v in self.scores(w, buffers, x, y).items()}

    def evaluate_clients(self, w: Tensor, buffers: Tensor, samples: Samples) -> dict[str, Tensor]:
        """Mean loss and metrics of every client, each float64 ``[clients]`` (NaN where a client has no sample).

        ``w`` is one model ``[P]`` for all, or one row a client ``[clients, P]`` (and ``buffers`` likewise).
        """
        counts = samples.counts()
        owner = torch.repeat_interleave(torch.arange(samples.clients), counts)
        if w.dim() == 1:
            each = self.scores(w, buffers, *samples.take(torch.arange(int(samples.offsets[0]), int(samples.offsets[-1]))))
        else:
            each = self._own_scores(w, buffers.expand(len(w), -1), samples)
        total = torch.zeros(samples.clients, dtype=torch.float64)
        return {name: total.index_add(0, owner, v.double().cpu()) / counts for name, v in each.items()}

    @torch.no_grad()
    def _own_scores(self, w: Tensor, buffers: Tensor, samples: Samples) -> dict[str, Tensor]:
        """Loss and metrics of every sample under its client's own model, in client order, several clients a forward pass."""
        counts, last = samples.counts(), int(samples.offsets[-1]) - 1
        size = int(counts.max())
        place, many = torch.arange(size), max(1, EVALUATION_CHUNK // size)
        parts: dict[str, list[Tensor]] = {}
        for ids in (torch.arange(i, min(i + many, len(w))) for i in range(0, len(w), many)):
            real = place < counts[ids, None]
            x, y = samples.take((samples.offsets[ids, None] + place * real).clamp(max=last))
            output = self.outputs(w[ids], buffers[ids], x).flatten(0, 1)
            for name, score in {"loss": self.loss, **self.metrics}.items():
                parts.setdefault(name, []).append(score(output, y.flatten(0, 1))[real.flatten().to(output.device)])
        return {name: torch.cat(values) for name, values in parts.items()}
