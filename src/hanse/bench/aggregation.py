"""Means of large updates: hanse's tree over shared memory, one always-on aggregator, and a process per aggregator over TCP.

Clients send a few buffers again and again (``players.py``), so that updates never exist all at once. Every case has processes of
its own and a round to warm up; the time is from the first request for an update to the mean. One bound is a plain loop of
``sums.add_(update)`` on all cores. Where updates are copied there is another one, of copying on all cores and then adding.

A case for which there is too little memory is left out, and so is one that takes too long; a line says so.

CPU seconds of the servers and aggregators and of the clients are apart. Memory is the peak of servers and aggregators: what each
has had for itself at most, its share of mapped files, and the shared memory that the service has taken at most.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hanse.bench.players import MOST, Child, held, sources
from hanse.core.errors import HanseError
from hanse.hierarchy.service import Aggregation
from hanse.hierarchy.store import Stored
from hanse.transport.blocks import SHARED

ROWS = tuple((updates, size) for size in (1_000_000, 25_000_000, 100_000_000) for updates in (32, 128, 512))
IN_PLACE, COPIED = "hanse, in place", "hanse, copied in"
ONE, LOCAL, TREE = "one aggregator, TCP", "one aggregator, local socket", "a process each, TCP"
COPIES = {IN_PLACE: 0, COPIED: 1, ONE: 2, LOCAL: 2, TREE: 2}
"""Copies of an update's bytes between the memory of a client and the reading of whoever adds it, kernel's included."""
FLAT, LARGE = "1,000 updates", "exchange"
COPYING = 2
"""Clients that copy at a time."""
FAN_IN = 8
CORES = os.cpu_count() or 1
SLOWEST = 0.25e9
"""Bytes a second that a case is given time for, beside the minutes that any may take."""
CLIENTS, SEGMENT = 6, 8_000_000
"""Of the exchange: clients, and numbers that travel together."""
MODEL = 425_000_000
"""Numbers of the exchanged model: 1.7 GB, half of 3.4 GB, because every client has one of its own."""


def cpu(pids: Iterable[int]) -> float:
    """CPU seconds of these processes, threads that have ended included, in hundredths."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def memory(pids: Iterable[int]) -> int:
    """Peak bytes of these processes without shared memory; of files that several have mapped each counts its share."""
    total = 0
    for pid in pids:
        lines = [
            line.split() for name in ("status", "smaps_rollup") for line in Path(f"/proc/{pid}/{name}").read_text().splitlines()
        ]
        kb = {words[0]: int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}
        total += kb["VmHWM:"] - kb["RssShmem:"] - kb["RssFile:"] + kb["Pss_File:"]
    return total * 1024


def timed(work: Callable[[int], float], updates: int, servers: Callable[[], list[int]], clients: list[int]) -> dict[str, float]:
    """Seconds and CPU seconds of a round, after another one; ``work`` gives the mean's first number."""
    work(min(updates, MOST))
    before = cpu(servers()), cpu(clients)
    began = time.perf_counter()
    first = work(updates)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "first": first, "cpu_s": cpu(servers()) - before[0], "client_cpu_s": cpu(clients) - before[1]}


def ours(who: str, updates: int, size: int, workers: int = 0, fan_in: int = FAN_IN, room: int = 0) -> dict[str, Any]:
    """``updates`` through shared memory, filled by the clients or lying there already.

    Where the clients copy, one core is theirs. ``room`` is the updates that the store holds at once.
    """
    workers = workers or (CORES if who == IN_PLACE else max(1, CORES - 1))
    buffers = sources(size) if who == IN_PLACE else []
    room = room or max(fan_in * workers + 4, len(buffers))
    out = torch.zeros(size)
    with ExitStack() as stack:
        clients = [stack.enter_context(Child("clients", size)) for _ in range(0 if who == IN_PLACE else COPYING)]
        budget = (room + 2 * workers + 2) * 4 * size
        service = stack.enter_context(Aggregation(size, workers=workers, fan_in=fan_in, budget=budget, idle=60))
        lying = []
        for update in buffers:
            lying.append(service.lend())
            lying[-1].values.copy_(update)
        buffers.clear()

        def work(updates: int) -> float:
            round = service.round(updates)
            if lying:
                for _, one in zip(range(updates), cycle(lying), strict=False):
                    round.hand_in(one, keep=True)
            else:
                asked = []
                for i in range(updates):
                    asked.append(service.lend())
                    clients[i % COPYING].tell("fill", asked[-1].name, i)
                    if len(asked) > min(2 * COPYING, room - fan_in):  # so that the clients need not wait for the next one
                        clients[(i + 1 - len(asked)) % COPYING].hear()
                        round.hand_in(asked.pop(0))
                for i in range(updates - len(asked), updates):
                    clients[i % COPYING].hear()
                    round.hand_in(asked.pop(0))
            return float(round.finish(out)[0][0])

        found = timed(work, updates, lambda: [os.getpid(), *service.aggregators], [c.process.pid for c in clients])
        return {**found, "memory": memory([os.getpid(), *service.aggregators]) + service.peak_bytes}


def theirs(who: str, updates: int, size: int) -> dict[str, Any]:
    """``updates`` over sockets to one aggregator, or to one a core, whose results go on to another one."""
    with ExitStack() as stack:
        path = f"{stack.enter_context(tempfile.TemporaryDirectory())}/socket" if who == LOCAL else "-"
        started = [Child("receiver", size, path) for _ in range(CORES + 1 if who == TREE else 1)]
        clients = stack.enter_context(Child("clients", size))
        receivers = [stack.enter_context(child) for child in started]
        for r in receivers:
            r.tell("where")
        addresses = [r.hear() for r in receivers]
        *leaves, last = receivers

        def work(updates: int) -> float:
            for i, leaf in enumerate(leaves):
                leaf.tell(len(range(i, updates, len(leaves))), 1, addresses[-1])
            last.tell(len(leaves) or updates, len(leaves) or 1)
            clients.tell("send", updates, *(addresses[:-1] or addresses))
            found = [float(r.hear()) for r in receivers][-1]
            clients.hear()
            return found

        pids = [r.process.pid for r in receivers]
        return {**timed(work, updates, lambda: pids, [clients.process.pid]), "memory": memory(pids)}


def bound(size: int, seconds: float = 1.0) -> dict[str, float]:
    """Bytes a second that plain loops on all cores read and add, and that they copy and then add: the best of some."""
    torch.set_num_threads(CORES)
    buffers, sums = sources(size), torch.zeros(size)
    copy, best = np.array_split(np.empty(size, np.float32), CORES), [np.inf, np.inf]
    end = time.perf_counter() + seconds
    with ThreadPoolExecutor(CORES) as pool:
        while time.perf_counter() < end:
            marks = [time.perf_counter()]
            for x in buffers:
                sums.add_(x)
            marks.append(time.perf_counter())
            for x in buffers:
                list(pool.map(np.copyto, copy, np.array_split(x.numpy(), CORES)))
            marks.append(time.perf_counter())
            best = [min(a, b) for a, b in zip(best, np.diff(marks), strict=True)]
    total, (adding, copying) = len(buffers) * sums.nbytes, best
    return {"bound": total / adding, "copy_bound": total / (copying + adding)}


def exchange(size: int = MODEL, clients: int = CLIENTS, segment: int = SEGMENT) -> dict[str, Any]:
    """All clients give their model and get the mean, segment by segment: the server never has a whole one.

    The next segment is written while one is added up and the mean of the last is read.
    """
    starts = range(0, size, segment)
    with ExitStack() as stack:
        started = [Child("client", size, segment) for _ in range(clients)]
        there = [stack.enter_context(child) for child in started]
        budget = (3 * clients + 4) * 4 * segment
        service = stack.enter_context(Aggregation(segment, workers=1, fan_in=clients, budget=budget, idle=60))

        def fill(start: int) -> list[Stored]:
            rooms = [service.lend() for _ in there]
            for client, room in zip(there, rooms, strict=True):
                client.tell("fill", room.name, start)
            return rooms

        def work(segments: int) -> float:
            filled, means = [fill(starts[0])], list[Stored]()
            for i in range(segments):
                if i >= 2:  # each client answers in turn: of the mean it has read, then of the segment it has written
                    for client in there:
                        client.hear()
                    means[i - 2].release()
                if i + 1 < segments:
                    filled.append(fill(starts[i + 1]))
                round = service.round(clients)
                for client, room in zip(there, filled[i], strict=True):
                    client.hear()
                    round.hand_in(room)
                means.append(service.lend())
                round.finish(means[i].values)
                for client in there:
                    client.tell("read", means[i].name, starts[i])
            for mean in means[-2:] if segments > 1 else means:
                for client in there:
                    client.hear()
                mean.release()
            return float(min(mean.values[0] for mean in means))

        servers = [os.getpid()]
        found = timed(work, len(starts), lambda: servers + service.aggregators, [c.process.pid for c in there])
        return {**found, "memory": memory(servers + service.aggregators) + service.peak_bytes}


def measure(who: str, updates: int = 0, size: int = 0) -> dict[str, Any]:
    """One case: seconds, CPU seconds, memory, and what of an update's bytes that makes."""
    if who == "bound":
        return bound(size)
    if who == LARGE:
        found, updates = exchange(size), 2 * CLIENTS
    elif who == FLAT:
        found = ours(COPIED, updates, size, workers=1, fan_in=3, room=4)
    else:
        found = (ours if who in (IN_PLACE, COPIED) else theirs)(who, updates, size)
    return {"case": who, "updates": updates, "size": size, **found, "updates_s": updates / found["seconds"]}


HEADERS = (
    "case", "updates", "numbers", "s", "updates/s", "GB/s", "of adding", "of copying and adding", "of one aggregator",
    "CPU s", "clients' CPU s", "peak MB", "models", "copies",
)  # fmt: skip


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row for people."""
    model, copies = 4 * row["size"], COPIES.get(row["case"], 1)
    return (
        row["case"],
        f"{row['updates']:,}",
        f"{row['size']:,}",
        f"{row['seconds']:.3f}",
        f"{row['updates_s']:.1f}",
        f"{row['updates_s'] * model / 1e9:.2f}",
        f"{row['updates_s'] * model / row['bound']:.2f}",
        f"{row['updates_s'] * model / row['copy_bound']:.2f}" if copies else "",
        f"{row['updates_s'] / row['one']:.2f}" if "one" in row else "",
        f"{row['cpu_s']:.2f}",
        f"{row['client_cpu_s']:.2f}",
        f"{row['memory'] / 1e6:.0f}",
        f"{row['memory'] / model:.2f}",
        f"{copies}",
    )


def needs(who: str, size: int) -> tuple[int, int]:
    """Bytes that a case takes about at most: in shared memory, and in all, with 1 GB for its programs."""
    mine, workers = held(size), max(1, CORES - 1)
    shared, own = {
        "bound": (0, mine + 2),
        IN_PLACE: (mine + 2 * CORES + 2, mine + 1),
        COPIED: (FAN_IN * workers + 4 + 2 * workers + 2, COPYING * mine + 1),
        FLAT: (8, COPYING * mine + 1),
        ONE: (0, mine + 3),
        LOCAL: (0, mine + 3),
        TREE: (0, mine + 3 * (CORES + 1)),
        LARGE: ((3 * CLIENTS + 4) * SEGMENT / size, CLIENTS),
    }[who]
    return int(4 * size * shared), int(4 * size * (shared + own)) + 10**9


def free() -> tuple[int, int]:
    """Bytes that are free: in shared memory, and in all."""
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    return shutil.disk_usage(SHARED).free, next(1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:")


def rows(repeats: int, one: Callable[[list[str], float], dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest of each case, in turn; of more than 10 GB each is run once. ``one`` runs a command and gives its last line."""

    def run(who: str, updates: int, size: int) -> dict[str, Any]:
        """A case's result, empty if it is left out."""
        for where, takes, there in zip(("shared memory", "memory"), needs(who, size), free(), strict=True):
            if takes > there:
                return left_out(who, updates, size, f"it takes {takes / 1e9:.1f} GB of {where}, {there / 1e9:.1f} GB are free")
        spec, limit = json.dumps({"who": who, "updates": updates, "size": size}), 600 + 4 * size * updates / SLOWEST
        try:
            return one([sys.executable, "-m", "hanse.bench.aggregation", spec], limit)
        except subprocess.TimeoutExpired:
            return left_out(who, updates, size, f"it has taken more than {limit:.0f} s")

    def bounds(size: int, before: dict[str, float]) -> dict[str, float]:
        return {name: max(value, before.get(name, 0.0)) for name, value in run("bound", 0, size).items()}

    table = []
    for updates, size in ROWS:
        best: dict[str, dict[str, Any]] = {}
        limits: dict[str, float] = {}
        for _ in range(repeats if 4 * size * updates <= 10e9 else 1):
            limits = bounds(size, limits)
            for who in COPIES if limits else ():  # where there is no room for a bound there is none for the rest
                found = run(who, updates, size)
                if found and (who not in best or found["seconds"] < best[who]["seconds"]):
                    best[who] = found
        firsts = [row["first"] for row in best.values()]
        if firsts and max(firsts) - min(firsts) > 1e-4:
            raise HanseError(f"not the same mean: {dict(zip(best, firsts, strict=True))}")
        beside = {**limits, **({"one": best[ONE]["updates_s"]} if ONE in best else {})}
        table += [{**row, **beside} for row in best.values()]
    limits = bounds(25_000_000, {})
    others = [run(FLAT, 1000, 25_000_000), run(LARGE, 0, MODEL)] if limits else []
    return [*table, *({**row, **limits} for row in others if row)]


def left_out(who: str, updates: int, size: int, why: str) -> dict[str, Any]:
    """Say why a case has no row."""
    print(f"{who}, {updates:,} updates of {size:,} numbers: left out: {why}", file=sys.stderr, flush=True)
    return {}


if __name__ == "__main__":
    from hanse.engines.execution import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
