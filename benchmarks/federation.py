"""What a real federation on Flower bears on this machine: rounds of FedAvg by numbers of clients and sizes of the model.

    python benchmarks/federation.py [--clients 2 4 8 16] [--millions 0.01 1 10 25] [--rounds 4]

Sizes are tried with two clients, numbers of clients with the smallest and the third. Seconds are of the rounds after the first;
memory is the most that was resident in the SuperLink, its ServerApp, a SuperNode and its ClientApp at any look, twice a second.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import psutil

from hanse.config import Settings
from hanse.deploy.app import bundle
from hanse.deploy.here import LINK, OnThisMachine
from hanse.track.folder import Folder

PARTS = {"flower-superlink": "link", "flwr-serverapp": "server", "flower-supernode": "node", "flwr-clientapp": "client"}
"""What the commands of a federation's processes have in them."""


class Case(NamedTuple):
    """What was measured: seconds a round, and megabytes of memory by part."""

    clients: int
    numbers: int
    seconds: float
    memory: Counter[str]


def settings(clients: int, millions: float, rounds: int) -> Settings:
    """Rounds in which almost nothing is computed."""
    hidden = max(1, round(millions * 1e6 / 75))  # 64 inputs, 10 classes
    return Settings.read(
        None,
        {
            "task": f"digits(hidden={hidden})",
            "clients": clients,
            "method": "FedAvg(steps=1)",
            "schedule": f"synchronous(cohort={clients})",
            "rounds": rounds,
            "engine": "flower(threads=1)",
        },
    )


def measured(clients: int, millions: float, rounds: int, folder: Path) -> Case:
    """One federation from its start to its end."""
    asked, names = settings(clients, millions, rounds), [f"client{i}" for i in range(clients)]
    bundle(asked, folder / "app", names)
    over, memory = threading.Event(), Counter[str]()
    with OnThisMachine(folder, names, database=True, config={name: f"client={i}" for i, name in enumerate(names)}) as federation:
        watcher = threading.Thread(target=watch, args=(federation, over, memory))
        watcher.start()
        try:
            ended = federation.run(folder / "app", seconds=1800)
        finally:
            over.set()
            watcher.join()
    assert ended.status == "completed", ended.log
    history = Folder(folder / LINK / "run").read().history
    numbers = asked.federation(0).problem.layout.size
    return Case(clients, numbers, (history[-1]["seconds"] - history[0]["seconds"]) / (rounds - 1), memory)


def watch(federation: OnThisMachine, over: threading.Event, memory: Counter[str]) -> None:
    """Keep the most that any process of each part has had."""
    while not over.wait(0.5):  # looking at all processes takes time that they need
        for process in federation.processes():
            try:
                command, size = " ".join(process.cmdline()), process.memory_info().rss / 1e6
            except psutil.Error:
                continue
            for word, part in PARTS.items():
                if word in command:
                    memory[part] = max(memory[part], round(size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--millions", type=float, nargs="*", default=[0.01, 1, 10, 25], help="sizes of the model")
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    cases = [(2, millions) for millions in given.millions]
    cases += [(n, millions) for millions in (given.millions[0], *given.millions[2:3]) for n in given.clients if n != 2]
    print("| clients | numbers | MB a message | s a round | updates/s | MB each way a second | link | server | node | client |")
    print("|" + "---:|" * 10)
    for clients, millions in cases:
        with tempfile.TemporaryDirectory() as folder:
            case = measured(clients, millions, given.rounds, Path(folder))
        size, memory = case.numbers * 4 / 1e6, case.memory
        figures = f"{size:.2f} | {case.seconds:.1f} | {clients / case.seconds:.2f} | {clients * size / case.seconds:.1f}"
        print(
            f"| {clients} | {case.numbers:,} | {figures} | " + " | ".join(f"{memory[p]}" for p in PARTS.values()) + " |", flush=True
        )


if __name__ == "__main__":
    main()
