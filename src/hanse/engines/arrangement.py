"""How the clients of a round are laid out on this machine: which gradient path, how many side by side, in how many threads.

No arrangement is best everywhere: batching wins by far when overhead dominates and gains nothing for convolutions on a CPU. So each
candidate is timed on the first cohort, and the choice is kept for this machine, so that a later run repeats bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hanse.core.cache import cache_folder
from hanse.engines.base import Arrangement

if TYPE_CHECKING:
    from hanse.engines.execution import Orders
    from hanse.engines.simulation import Simulation

BATCH_BYTES = 4 << 20
"""Weights of one batch of clients should stay within a core's share of the cache."""


LONG = 0.05
"""Seconds from which a trial counts as arithmetic rather than overhead."""


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def candidates(net: Simulation, cohort: Tensor) -> list[Arrangement]:
    """What is worth timing.

    Batches are sized by cache, never more: rows of models that do not fit cost memory and win nothing. The exception is a single
    plain step, which makes no rows. Cores take clients rather than parts of one operation, so that a busy neighbour slows one of
    them instead of all; only where there are fewer clients than cores does an operation get several.
    """
    cores, engine, size = available_cores(), net.engine, len(cohort)
    fixed = {k: v for k, v in engine if k in Arrangement._fields and v is not None}
    if not net.method.batched:
        return [Arrangement(**{"path": "loop", "chunk": 1, "workers": 1, "threads": cores, **fixed})]
    fitting = min(size, max(1, BATCH_BYTES // (net.problem.layout.size * net.problem.start.element_size())))
    single = int(net.plan.lengths(net.samples.counts(cohort)).max()) == 1
    shared = "private" not in net.kept.widths and net.method.clip is None and net.method.local.plain
    rowless = single and shared and net.method.plain and net.codec.plain and net.executor.shortcuts
    found = []
    for path, gradient in net.paths.items():
        if path != "stacked" and "stacked" in net.paths and engine.path is None:
            continue  # where layers can be stacked, the general ways do the same products with more overhead and more memory
        chunks = {1} if path == "loop" else {fitting}
        if rowless and gradient.descend is not None:
            chunks |= {size, -(-size // cores)}
        if engine.workers is not None and path != "loop":  # so that none of them has nothing to do
            chunks |= {min(fitting, -(-size // engine.workers))}
        for chunk in sorted(chunks):
            found.append(Arrangement(path, chunk, 1, 1 if size >= cores else cores))
            if chunk < size:
                found.append(Arrangement(path, chunk, min(cores, -(-size // chunk)), 1))
    return list(dict.fromkeys(Arrangement(**{**a._asdict(), **fixed}) for a in found if a.path == fixed.get("path", a.path)))


def fastest(net: Simulation, orders: Orders) -> Arrangement:
    """The arrangement remembered for this work on this machine, or the fastest one, by timing each on some of the clients."""
    memory, options = _Memory(net, len(orders)), candidates(net, orders.clients)
    known = memory.read()
    if known in options:
        return known
    if len(options) > 1:
        best = min(options, key=_Trial(net, orders))
        memory.write(best)
        return best
    return options[0]


class _Trial:
    """Seconds per client of an arrangement, on some of the clients; candidates that are hopeless are given up early."""

    def __init__(self, net: Simulation, orders: Orders) -> None:
        self.net, self.orders = net, orders
        self.best = float("inf")

    def __call__(self, option: Arrangement) -> float:
        few, many = (self.orders.take(slice(n * option.workers)) for n in (2, max(option.chunk, 2)))
        try:
            self._time(few, option)  # first calls allocate and compile
        except RuntimeError:  # a model that vmap cannot trace; if no path can, the round itself says why
            return float("inf")
        spent = self._time(few, option)
        # Batching makes overhead vanish, not arithmetic: where a few clients take this long, more of them are not much faster each.
        if spent > LONG and spent / len(few) > 2 * self.best:
            return float("inf")
        each = min(self._time(many, option) / len(many) for _ in range(1 if spent > LONG else 5))
        self.best = min(self.best, each)
        return each

    def _time(self, orders: Orders, option: Arrangement) -> float:
        began = time.perf_counter()
        self.net.executor.run(orders, option, total=True)
        return time.perf_counter() - began


class _Memory:
    """Choices of earlier runs, one small file per kind of work, in the user's cache folder."""

    def __init__(self, net: Simulation, cohort: int) -> None:
        what = [
            type(net.method).__name__,
            str(net.plan),
            str(net.method.local),
            str(net.engine),
            ",".join(net.paths),
            f"{net.problem.shared} of {net.problem.layout.size}",
            str(net.codec) if net.privacy is None else f"{net.codec}, {net.privacy}",
            str(net.problem.model),
            str(net.problem.dtype),
            str(tuple(net.samples.x.shape[1:])),
            str(cohort),
            str(int(net.samples.counts().double().mean())),
            str(available_cores()),
            torch.__version__,
        ]
        name = hashlib.blake2b("\n".join(what).encode(), digest_size=12).hexdigest()
        self.file = cache_folder() / "arrangements" / f"{name}.json"

    def read(self) -> Arrangement | None:
        try:
            path, *numbers = json.loads(self.file.read_text())
            return Arrangement(str(path), *map(int, numbers))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, choice: Arrangement) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(choice))
            part.replace(self.file)
        except OSError:
            pass  # no cache folder: the choice is made again next time
