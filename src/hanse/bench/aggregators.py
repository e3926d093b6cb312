"""Robust rules beside the plain mean: how many times as long each takes, on the same rows in the same process.

Every rule has a process of its own. The mean is timed before and after each run of the rule; the ratio is that of the least times.
byzfl stands beside the rules that it has; where it would take more than a minute it gets a tenth of the columns, and the mean too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hanse.aggregators import Aggregator
from hanse.core.streams import Streams

CLIENTS, COLUMNS, THREADS = 50, 10_000_000, 2
RULES: dict[str, tuple[str, dict[str, Any]] | None] = {
    "mean": ("Average", {}),
    "krum(10)": ("Krum", {"f": 10}),
    "multi_krum(10)": ("MultiKrum", {"f": 10}),
    "geometric_median": ("GeometricMedian", {"nu": 1e-6, "T": 8}),
    "centred_clipping(10, iterations=3)": ("CenteredClipping", {"tau": 10.0, "L": 3}),
    "flag": None,
    "flag(lam=1)": None,
    "median": ("Median", {}),
    "trimmed_mean(10)": ("TrMean", {"f": 10}),
    "meamed(10)": ("Meamed", {"f": 10}),
    "phocas(10)": None,
    "bulyan(10)": None,
    "nnm(10) | krum(10)": None,
    "nnm(10) | trimmed_mean(10)": None,
    "clipping | mean": None,
}
"""Every rule, and what byzfl has of it."""


def byzfl() -> Any:
    """byzfl's rules and pre-aggregations; None where it is not installed."""
    if "byzfl" not in sys.modules:
        spec = find_spec("byzfl")
        if spec is None or not spec.submodule_search_locations:
            return None
        # Its own __init__ asks for data sets and networks, which the rules do not need.
        bare = ModuleType("byzfl")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["byzfl"] = bare
    return import_module("byzfl.aggregators")


def seconds(work: Callable[[Tensor], Any], rows: Tensor, repeats: int) -> dict[str, float]:
    """Least seconds of ``work`` and of the mean, in turn, and the ratio."""
    times: dict[str, list[float]] = {"mean_s": [], "seconds": []}
    for _ in range(repeats):
        for key, run in (("mean_s", lambda x: x.mean(0)), ("seconds", work), ("mean_s", lambda x: x.mean(0))):
            began = time.perf_counter()
            run(rows)
            times[key].append(time.perf_counter() - began)
    least = {key: min(spent) for key, spent in times.items()}
    return {**least, "ratio": least["seconds"] / least["mean_s"]}


def measure(name: str, clients: int = CLIENTS, columns: int = COLUMNS, repeats: int = 3, peer: bool = True) -> dict[str, Any]:
    """Seconds of a rule and of the mean on normal numbers ``[clients, columns]`` in float32; byzfl's where ``peer``."""
    torch.set_num_threads(THREADS)
    rows = torch.randn(clients, columns, generator=Streams(0).torch("workload"))
    found = {"case": name, "clients": clients, "columns": columns, **seconds(Aggregator.parse(name), rows, repeats)}
    theirs, judge = RULES.get(name), byzfl() if peer else None
    if theirs and judge is not None:
        rule, settings = getattr(judge, theirs[0]), theirs[1]
        small = rows[:, : max(1, columns // 10)].contiguous()
        try:
            beside = seconds(lambda x: rule(**settings)(x), small, 1)
            found["byzfl_columns"] = small.shape[1]
            if beside["seconds"] * 10 <= 60:
                beside = seconds(lambda x: rule(**settings)(x), rows, 1)
                found["byzfl_columns"] = columns
            found |= {"byzfl_s": beside["seconds"], "byzfl_ratio": beside["ratio"]}
        except RuntimeError as error:  # torch.quantile takes 16 million numbers at most
            found["byzfl_error"] = str(error).splitlines()[0]
    return found


HEADERS = "rule", "rows", "numbers a row", "s", "of the mean", "byzfl, of the mean", "numbers there"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row for people."""
    theirs = f"{row['byzfl_ratio']:.1f}" if "byzfl_ratio" in row else row.get("byzfl_error", "")
    size = f"{row['byzfl_columns']:,}" if "byzfl_ratio" in row else ""
    return row["case"], f"{CLIENTS}", f"{row['columns']:,}", f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", theirs, size


def rows(repeats: int, one: Callable[[list[str]], dict[str, Any]], columns: int = COLUMNS) -> list[dict[str, Any]]:
    """One row a rule, that of the least ratio; ``one`` runs a command and gives the last line of its output."""
    best: dict[str, dict[str, Any]] = {}
    for i in range(repeats):
        for name in RULES:
            spec = {"name": name, "columns": columns, "peer": i == 0}
            found = one([sys.executable, "-m", "hanse.bench.aggregators", json.dumps(spec)])
            before = best.setdefault(name, found)
            if found["ratio"] < before["ratio"]:
                before |= {key: found[key] for key in ("seconds", "mean_s", "ratio")}
    return list(best.values())


if __name__ == "__main__":
    from hanse.engines.execution import keep_freed_memory

    keep_freed_memory()
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
