"""How the clients of a round are laid out on this machine: which gradient path, how many side by side, in how many threads.

No arrangement is best everywhere: batching wins by far when overhead dominates and gains nothing for convolutions on a CPU. So each
candidate is timed on the first cohort, and the choice is kept for this machine, so that a later run repeats bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hanse.core.messages import Tensors

if TYPE_CHECKING:
    from hanse.engines.local import LocalNetwork

BATCH_BYTES = 4 << 20
"""Weights of one batch of clients should stay within a core's share of the cache."""


class Arrangement(NamedTuple):
    """A gradient path, clients per batch, batches at a time, threads inside one operation."""

    path: str
    chunk: int
    workers: int
    threads: int

    def __str__(self) -> str:
        return f"{self.path}, {self.chunk} clients a batch, {self.workers} x {self.threads} threads"


def candidates(net: LocalNetwork, cohort: int) -> list[Arrangement]:
    """What is worth timing, the likely fastest first."""
    cores, engine = os.cpu_count() or 1, net.engine
    row = net.problem.layout.size * net.problem.start.element_size()
    fitting = min(cohort, max(1, BATCH_BYTES // row))
    found = []
    for path in net.paths:
        if path == "loop":
            found += [Arrangement(path, 1, cores, 1), Arrangement(path, cohort, 1, 1)]
            continue
        for chunk in sorted({fitting, cohort}):
            found += [Arrangement(path, chunk, 1, threads) for threads in sorted({1, cores})]
    wanted = {"path": engine.path, "chunk": engine.chunk, "workers": engine.workers, "threads": engine.threads}
    fixed = [a._replace(**{k: v for k, v in wanted.items() if v is not None}) for a in found]
    return list(dict.fromkeys(fixed))[::-1]


def fastest(net: LocalNetwork, clients: Tensor, work: str, message: Tensors) -> Arrangement:
    """The arrangement remembered for this work on this machine, or the fastest one, by timing each on some of ``clients``."""
    memory = _Memory(net, len(clients))
    known = memory.read()
    if known is not None:
        return known
    options = candidates(net, len(clients))
    best, choice = float("inf"), options[0]
    for option in options:
        some = clients[: max(option.chunk, option.workers)]
        net.execute(some[: option.workers], work, message, option)  # first calls allocate and compile
        spent, runs = float("inf"), 0
        began = time.perf_counter()
        while runs < 5 and (runs == 0 or time.perf_counter() - began < 0.05):
            start = time.perf_counter()
            net.execute(some, work, message, option)
            spent, runs = min(spent, (time.perf_counter() - start) / len(some)), runs + 1
            if spent > 4 * best:
                break
        if spent < best:
            best, choice = spent, option
    if len(options) > 1:
        memory.write(choice)
    return choice


class _Memory:
    """Choices of earlier runs, one small file per kind of work, in the user's cache folder."""

    def __init__(self, net: LocalNetwork, cohort: int) -> None:
        what = [
            type(net.method).__name__,
            str(net.plan),
            str(net.method.local),
            str(net.engine),
            str(net.codec),
            str(net.problem.model),
            str(net.problem.dtype),
            str(tuple(net.samples.x.shape[1:])),
            str(cohort),
            str(int(net.samples.counts().double().mean())),
            str(os.cpu_count()),
            torch.__version__,
        ]
        name = hashlib.blake2b("\n".join(what).encode(), digest_size=12).hexdigest()
        folder = Path(os.environ.get("HANSE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hanse")
        self.file = folder / "arrangements" / f"{name}.json"

    def read(self) -> Arrangement | None:
        try:
            path, chunk, workers, threads = json.loads(self.file.read_text())
            return Arrangement(str(path), int(chunk), int(workers), int(threads))
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
