"""Kill, freeze and slow the processes of a run on seeded scripts, and see what it comes to.

    python benchmarks/faults.py processes [--scripts 100] [--first 0] [--out FOLDER]
    python benchmarks/faults.py ray       [--scripts 20]

A script is a list of deeds at times: against a worker or actor (killed, stopped for good, stopped for a moment), or against the
server (killed and started again). At the end: the run has finished, or said in one line why not; every round is in the history
once; what went into each round, by client, version and bits, is what went into it without faults, once; the model is the same bit
for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from hanse.track.folder import Folder

HERE = Path(__file__).parent
ENGINES = {
    "processes": "processes(path='stacked', chunk=2, workers=3, threads=1, patience=2.0)",
    "ray": "ray(path='stacked', chunk=2, workers=3, threads=1, cpus=0.1)",
}
WORKERS = {"processes": "spawn_main", "ray": "ray::Shard"}
"""What the command of a worker has in it."""
DEEDS = ("kill a worker", "kill a worker", "stop a worker", "pause a worker", "kill the server")
ROUNDS = 30
LONGEST = 240.0
"""Seconds after which a run that has not ended has failed."""


class Deed(NamedTuple):
    """What is done, and how many seconds after the one before."""

    after: float
    what: str
    whom: int


def script(seed: int, engine: str, lasts: float) -> list[Deed]:
    """Up to five deeds within the seconds that a run lasts from its first round on."""
    chance = random.Random(f"{engine} {seed}")
    times = sorted(chance.uniform(0, lasts) for _ in range(chance.randint(1, 5)))
    befores = [0.0, *times]
    kinds = [d for d in DEEDS if engine == "processes" or d != "stop a worker"]  # Ray has no name for an actor that stands still
    return [Deed(t - b, chance.choice(kinds), chance.randrange(3)) for b, t in zip(befores, times, strict=False)]


class Server:
    """The process of a run, and those below it."""

    def __init__(self, folder: Path, engine: str) -> None:
        self.folder, self.engine, self.starts = folder, engine, 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "stderr.txt").open("ab") as err:
            command = [sys.executable, str(HERE / "faulted.py"), str(self.folder), ENGINES[self.engine], str(ROUNDS)]
            self.process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=err)

    def workers(self) -> list[psutil.Process]:
        found = []
        with suppress(psutil.Error):
            for child in self.process.children(recursive=True):
                with suppress(psutil.Error):
                    if WORKERS[self.engine] in " ".join(child.cmdline()):
                        found.append(child)
        return sorted(found, key=lambda process: process.pid)

    def reached(self, round_: int) -> None:
        """Wait for a round's line in the history, or for a run that ends before it."""
        history = self.folder / "history.jsonl"
        until(lambda: self.process.poll() is not None or (history.exists() and history.read_bytes().count(b"\n") >= round_))

    def kill(self) -> None:
        below = []
        with suppress(psutil.Error):
            below = self.process.children(recursive=True)
        self.process.kill()
        self.process.wait()
        if self.engine == "ray":  # a cluster of its own, which would outlive it for some seconds
            for child in below:
                with suppress(psutil.Error):
                    child.kill()


def until(there: Callable[[], bool]) -> None:
    """Look again and again, for no longer than a run may take."""
    began = time.monotonic()
    while not there() and time.monotonic() - began < LONGEST:
        time.sleep(0.02)


def do(deed: Deed, server: Server) -> str:
    """Carry out a deed; what was done."""
    if deed.what == "kill the server":
        server.kill()
        server.start()
        return deed.what
    until(lambda: bool(server.workers()) or server.process.poll() is not None)  # they take seconds to start
    workers = server.workers()
    if not workers:
        return f"{deed.what}: there is none"
    worker = workers[deed.whom % len(workers)]
    with suppress(psutil.Error):
        if deed.what == "kill a worker":
            worker.kill()
        else:
            worker.send_signal(signal.SIGSTOP)
            if deed.what == "pause a worker":
                time.sleep(0.3)
                worker.send_signal(signal.SIGCONT)
    return deed.what


def play(seed: int, engine: str, folder: Path, lasts: float) -> tuple[list[str], int | None]:
    """One script on one run: what was done, and the exit status, None if it never ended."""
    server, done = Server(folder, engine), []
    server.reached(1)
    for deed in script(seed, engine, lasts):
        time.sleep(deed.after)
        if server.process.poll() is not None:
            break
        done.append(do(deed, server))
    try:
        status: int | None = server.process.wait(timeout=LONGEST)
    except psutil.TimeoutExpired:
        server.kill()
        status = None
    return done, status


def ledger(folder: Path) -> dict[int, Any]:
    """What went into each round last; a round that was lost with the server is done again."""
    found: dict[int, Any] = {}
    for line in (folder / "ledger.jsonl").read_text().splitlines():
        round_, who, bits = json.loads(line)
        found[round_] = [who, bits]
    return found


def wrong(folder: Path, expected: Path, status: int | None) -> Iterator[str]:
    """What is not as it should be."""
    if status is None:
        yield f"it had not ended after {LONGEST:g} s"
        return
    if status != 0:
        last = (folder / "stderr.txt").read_text().strip().splitlines()[-1:]
        yield f"status {status}: {last}"
        return
    one, other = Folder(folder).read(), Folder(expected).read()
    if [r["round"] for r in one.history] != list(range(1, len(other.history) + 1)):
        yield f"rounds in the history: {[r['round'] for r in one.history]}"
    if one.history != other.history:
        yield "another history"
    mine, theirs = ledger(folder), ledger(expected)
    if mine != theirs:
        yield f"other updates in rounds {[r for r in theirs if mine.get(r) != theirs[r]]}"
    for clients in (who for who, _ in mine.values()):
        if len({client for client, _ in clients}) < len(clients):
            yield f"an update twice: {clients}"
    if any(not torch.equal(t, one.weights[n]) for n, t in other.weights.items()):
        yield "another model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=[*ENGINES])
    parser.add_argument("--scripts", type=int, default=0, help="how many [100 for processes, 20 for ray]")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--out", type=Path, default=None, help="where the runs go [a temporary folder]")
    given = parser.parse_args()
    count = given.scripts or {"processes": 100, "ray": 20}[given.engine]
    out = given.out or Path(tempfile.mkdtemp(prefix="faults-"))
    expected = out / "undisturbed"
    server = Server(expected, given.engine)
    server.reached(1)
    began = time.monotonic()
    server.reached(ROUNDS)
    lasts = time.monotonic() - began
    assert server.process.wait() == 0, (expected / "stderr.txt").read_text()
    bad, deeds = 0, 0
    for seed in range(given.first, given.first + count):
        done, status = play(seed, given.engine, out / str(seed), lasts)
        deeds += len(done)
        found = [*wrong(out / str(seed), expected, status)]
        bad += bool(found)
        print(f"{seed:4} {'; '.join(done)}: {'; '.join(found) or 'the same'}", flush=True)
    print(f"{count} scripts, {deeds} deeds, {bad} wrong")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
