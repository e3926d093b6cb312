"""Interleaved timing: every repetition runs all cases of a workload one after another, each in a fresh process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from hanse.bench import aggregation, aggregators, codecs, gossip
from hanse.bench.workloads import Name, export
from hanse.core.errors import HanseError, unknown

CASES: dict[str, dict[str, Any]] = {
    "raw loop": {"who": "raw"},
    "hanse": {"who": "hanse"},
    "raw loop, 5 epochs": {"who": "raw", "epochs": 5},
    "hanse, 5 epochs": {"who": "hanse", "epochs": 5},
    "hanse, SCAFFOLD": {"who": "hanse", "method": "Scaffold"},
    "hanse, top-k 10 %": {"who": "hanse", "codec": "topk(0.1)"},
    "hanse, bf16": {"who": "hanse", "engine": "local(precision='bf16')"},
    "hanse, FedBuff": {"who": "hanse", "buffer": 10},
    "hanse, FedBuff, each client alone": {"who": "alone", "buffer": 10},
}
ONLY = {"hanse, bf16": ("W2",), "hanse, FedBuff": ("W1", "W2", "W3"), "hanse, FedBuff, each client alone": ("W1", "W2", "W3")}
SAME = ("hanse", "raw loop"), ("hanse, 5 epochs", "raw loop, 5 epochs")
TOLERANCE = 1e-2
"""Largest relative difference of test losses between programs that do the same work in another order of additions."""


def peers() -> dict[str, tuple[Path, Path]]:
    """Scripts of other tools and the interpreters to run them, from the folders ``HANSE_PEERS/<name>/bin/python``."""
    venvs, scripts = os.environ.get("HANSE_PEERS"), Path("benchmarks/peers")
    if not venvs:
        return {}
    names = {p.stem.removeprefix("peer_"): p for p in sorted(scripts.glob("peer_*.py"))}
    found = {name: (Path(venvs) / name / "bin" / "python", p) for name, p in names.items()}
    return {name: pair for name, pair in found.items() if pair[0].is_file()}


def one(command: list[str], timeout: float = 600) -> dict[str, Any]:
    """Run a case; its last line of output is the result."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise HanseError(f"benchmark case {command[-1]} failed: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure(workload: Name, repeats: int, console: Console, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """``repeats`` results of every case of a workload; ``folder`` takes the data for other tools."""
    found: dict[str, list[dict[str, Any]]] = {}
    others, data = peers(), folder / f"{workload}.npz"
    if others:
        export(workload, data)
    for i in range(repeats):
        for name, case in CASES.items():
            if workload not in ONLY.get(name, (workload,)):
                continue
            console.print(f"{workload} {i + 1}/{repeats} {name}", style="dim")
            spec = json.dumps({"workload": workload, **case})
            found.setdefault(name, []).append(one([sys.executable, "-m", "hanse.bench.case", spec]))
        for name, (python, script) in others.items():
            console.print(f"{workload} {i + 1}/{repeats} {name}", style="dim")
            try:
                found.setdefault(name, []).append(one([str(python), str(script), str(data)]))
            except (HanseError, subprocess.TimeoutExpired) as error:
                console.print(f"{name}: {error}", style="red")
                others = {k: v for k, v in others.items() if k != name}
                found.pop(name)
    return found


def rows(workload: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a case: medians, and the ratio to the raw loop of the same number of epochs, paired by repetition."""
    table = []
    for name, results in found.items():
        base = "raw loop, 5 epochs" if "5 epochs" in name else "raw loop"
        ratios = [r["seconds"] / b["seconds"] for r, b in zip(results, found[base], strict=True)]
        row = {k: statistics.median(r[k] for r in results) for k in ("seconds", "first", "peak_mb", "loss", "accuracy")}
        spread = {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        table.append({"workload": workload, "case": name, **row, **spread, "arrangement": results[-1].get("arrangement", "")})
    return table


def differences(table: list[dict[str, Any]]) -> list[str]:
    """Cases that should have done the same work and did not."""
    loss = {row["case"]: row["loss"] for row in table}
    return [
        f"{a}: loss {loss[a]:.5f}, {b}: {loss[b]:.5f}"
        for a, b in SAME
        if a in loss and abs(loss[a] - loss[b]) > TOLERANCE * loss[b]
    ]


PARTS = {"codecs": codecs, "aggregators": aggregators, "gossip": gossip, "aggregation": aggregation}
"""Parts side by side, each in a file with ``rows``, ``HEADERS`` and ``cells``."""


def run(workloads: list[str], repeats: int, as_json: bool) -> None:
    """Measure, print a table a workload, and fail when cases that should agree do not."""
    names: tuple[Name, ...] = get_args(Name)
    for asked in workloads:
        if asked not in (*names, *PARTS):
            raise unknown("workload", asked, (*names, *PARTS))
    progress, out, everything, different = Console(stderr=True), Console(), list[dict[str, Any]](), list[str]()
    for workload in [name for name in names if name in workloads or not workloads]:
        with tempfile.TemporaryDirectory() as folder:
            table = rows(workload, measure(workload, repeats, progress, Path(folder)))
        everything += table
        if not as_json:
            shown = Table("case", "s per round", "ratio to raw loop", "first round", "peak MB", "loss", "accuracy", title=workload)
            for row in table:
                ratio = f"{row['ratio']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
                numbers = f"{row['seconds']:.5f}", ratio, f"{row['first']:.2f}", f"{row['peak_mb']:.0f}"
                shown.add_row(row["case"], *numbers, f"{row['loss']:.5f}", f"{row['accuracy']:.4f}")
            out.print(shown)
        different += [f"{workload}: {text}" for text in differences(table)]
    for name, part in PARTS.items():
        if name not in workloads:
            continue
        table = part.rows(repeats, one)
        everything += table
        if not as_json:
            shown = Table(*part.HEADERS, title=name)
            for row in table:
                shown.add_row(*part.cells(row))
            out.print(shown)
    if as_json:
        print(json.dumps(everything))
    if different:
        raise HanseError(f"not the same work: {'; '.join(different)}")
