"""Gossip: one step of mixing beside a plain copy of the same models and beside the dense product ``W @ X``.

No step can be faster than a copy, which reads all models once and writes as much. Each topology runs in a process of its own, and
in it the three in turn; times are the least of several.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from hanse.core.streams import Streams
from hanse.topologies import Mixing, Topology

NODES, SIZE = 1_000, 25_000
CASES = ("ring", "torus", "exponential", "random_regular(8)", "scale_free", "star", "complete")
TIMES = ("seconds", "copy_s", "dense_s")


def measure(name: str, nodes: int = NODES, size: int = SIZE, repeats: int = 5) -> dict[str, Any]:
    """Seconds of mixing ``nodes`` models of ``size`` float32 each, of a copy and of the dense product."""
    mixing = Mixing.metropolis(Topology.parse(name).graph(nodes, Streams(0), 0))
    x = torch.randn(nodes, size, generator=Streams(0).torch("workload"))
    dense, copied, product = mixing.matrix().float(), torch.empty_like(x), torch.empty_like(x)
    ways: tuple[Callable[[], object], ...] = (
        lambda: mixing.mix(x),
        lambda: copied.copy_(x),
        lambda: torch.mm(dense, x, out=product),
    )
    spent: list[list[float]] = []
    for _ in range(repeats + 1):  # the first one finds memory that was never touched
        marks = [time.perf_counter()]
        for way in ways:
            way()
            marks.append(time.perf_counter())
        spent.append([after - before for before, after in pairwise(marks)])
    least = (min(column) for column in zip(*spent[1:], strict=True))
    return {"case": name, "nodes": nodes, "size": size, **dict(zip(TIMES, least, strict=True))}


HEADERS = "topology", "nodes", "numbers a node", "s", "of a copy", "of dense"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row for people."""
    ratios = f"{row['of_copy']:.2f}", f"{row['of_dense']:.3f}"
    return row["case"], f"{row['nodes']:,}", f"{row['size']:,}", f"{row['seconds']:.4f}", *ratios


def rows(repeats: int, one: Callable[[list[str]], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each topology; ``one`` runs a command and gives the last line of its output."""
    best: dict[str, dict[str, Any]] = {}
    for _ in range(repeats):
        for name in CASES:
            found = one([sys.executable, "-m", "hanse.bench.gossip", json.dumps({"name": name})])
            before = best.setdefault(name, found)
            before |= {key: min(before[key], found[key]) for key in TIMES}
    return [
        {**row, "of_copy": row["seconds"] / row["copy_s"], "of_dense": row["seconds"] / row["dense_s"]} for row in best.values()
    ]


if __name__ == "__main__":
    from hanse.engines.execution import keep_freed_memory

    keep_freed_memory()
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
