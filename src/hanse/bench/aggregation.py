"""Means of large updates: hanse's tree over shared memory, one always-on aggregator, and a process per aggregator over TCP.

Processes that stand for the clients have a few source buffers, 400 MB of them or two, and at most 32, and send each again and
again, so that updates never exist all at once. Every case has processes of its own and a round to warm up; the time is from the
first request for an update to the mean. The bound is a plain loop of ``sums.add_(update)`` on all cores.

CPU seconds of the servers and aggregators and of the clients are apart. Memory is the peak of servers and aggregators: what each
has had for itself at most, its share of mapped files, and the shared memory that the service has taken at most.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanse.core.errors import HanseError
from hanse.core.streams import Streams
from hanse.core.wire import pieces, read, wire_size
from hanse.hierarchy.service import Aggregation
from hanse.hierarchy.store import Stored
from hanse.transport.blocks import attach

ROWS = tuple((updates, size) for size in (1_000_000, 25_000_000, 100_000_000) for updates in (32, 128, 512))
IN_PLACE, COPIED = "hanse, in place", "hanse, copied in"
ONE, LOCAL, TREE = "one aggregator, TCP", "one aggregator, local socket", "a process each, TCP"
COPIES = {IN_PLACE: 0, COPIED: 1, ONE: 2, LOCAL: 2, TREE: 2}
"""Copies of an update's bytes between the memory of a client and the reading of whoever adds it, kernel's included."""
FLAT, LARGE = "1,000 updates", "exchange"
SOURCES = 400_000_000
"""Bytes that the clients' buffers hold together."""
COPYING = 2
"""Clients that copy at a time."""
WARM = 32
"""Updates of the round before, at most."""
FAN_IN = 8
CORES = os.cpu_count() or 1
CLIENTS, SEGMENT = 6, 8_000_000
"""Of the exchange: clients, and numbers that travel together."""
MODEL = 425_000_000
"""Numbers of the exchanged model: 1.7 GB, half of 3.4 GB, because every client has one of its own."""


def sources(size: int) -> list[Tensor]:
    """The clients' buffers."""
    return [torch.randn(size, generator=Streams(i).torch("workload")) for i in range(min(max(2, SOURCES // (4 * size)), WARM))]


class Child:
    """Another process of this file, that reads commands and writes answers, a line each."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "hanse.bench.aggregation", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"{self.process.args!r} has ended")
        return line.strip()

    def __enter__(self) -> Child:
        self.hear()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def commands() -> Iterator[list[str]]:
    """What the parent asks for, after saying that all is ready."""
    print("ready", flush=True)
    for line in sys.stdin:
        yield line.split()


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


# What stands for the clients


def send(buffers: Sequence[Tensor], to: str, numbers: range) -> None:
    """Send the updates of these numbers over one connection to a port of this machine or a local socket."""
    with socket.socket(socket.AF_INET if to.isdigit() else socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.connect(("127.0.0.1", int(to)) if to.isdigit() else to)
        for i in numbers:
            send_one(s, buffers[i % len(buffers)], 1.0)


def send_one(s: socket.socket, update: Tensor, weight: float) -> None:
    """A message, its length and then safetensors with the weight beside, from where it lies."""
    tensors, about = {"x": update}, {"weight": str(weight)}
    s.sendall(wire_size(tensors, about=about).to_bytes(8, "little"))
    for piece in pieces(tensors, about):
        s.sendall(piece)


def play_clients(size: int) -> None:
    """``fill NAME I``: copy update I into a block; ``send N ADDRESS...``: deal N updates out to receivers, side by side."""
    buffers = sources(size)
    blocks: dict[str, Any] = {}
    for verb, *words in commands():
        if verb == "fill":
            np.copyto(mapped(blocks, words[0], size), buffers[int(words[1]) % len(buffers)].numpy())
        else:
            updates, *receivers = words
            threads = [
                threading.Thread(target=send, args=(buffers, to, range(i, int(updates), len(receivers))))
                for i, to in enumerate(receivers)
            ]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        print("done", flush=True)


def mapped(blocks: dict[str, Any], name: str, size: int) -> Any:
    """A block as numbers; blocks are mapped once."""
    if name not in blocks:
        blocks[name] = attach(name)[: 4 * size].view(torch.float32).numpy()
    return blocks[name]


def play_client(size: int, segment: int) -> None:
    """A client of the exchange: ``fill NAME START`` gives a segment of its model, ``read NAME START`` takes one."""
    model, blocks = np.ones(size, np.float32), dict[str, Any]()
    for verb, name, start in commands():
        mine = model[int(start) : int(start) + segment]
        block = mapped(blocks, name, segment)[: len(mine)]
        np.copyto(*((block, mine) if verb == "fill" else (mine, block)))
        print("done", flush=True)


# The others


def play_receiver(size: int, path: str) -> None:
    """An always-on aggregator on a TCP port (``path`` is ``-``) or a local socket, with one thread.

    ``N [CONNECTIONS [PARENT]]``: receive N updates, add each, and send the mean to a parent or keep it.
    """
    listener = socket.create_server(("127.0.0.1", 0)) if path == "-" else socket.socket(socket.AF_UNIX)
    if path != "-":
        listener.bind(path)
        listener.listen()
    sums = torch.zeros(size)
    buffer = torch.empty(0, dtype=torch.uint8)
    where = str(listener.getsockname()[1]) if path == "-" else path
    for words in commands():
        if words[0] == "where":
            print(where, flush=True)
            continue
        updates, connections, *parent = words
        sums.zero_()
        weight = 0.0
        opened = [listener.accept()[0] for _ in range(int(connections))]
        for i in range(int(updates)):
            s = opened[i % len(opened)]
            length = int.from_bytes(s.recv(8, socket.MSG_WAITALL), "little")
            if len(buffer) != length:
                buffer = torch.empty(length, dtype=torch.uint8)
            view, got = buffer.numpy().data, 0
            while got < length:
                got += s.recv_into(view[got:])
            tensors, about = read(buffer)
            sums.add_(tensors["x"], alpha=float(about["weight"]))
            weight += float(about["weight"])
        sums.div_(weight)
        for s in opened:
            s.close()
        for to in parent:
            with socket.create_connection(("127.0.0.1", int(to))) as s:
                send_one(s, sums, weight)
        print(float(sums[0]), flush=True)


# Cases


def timed(work: Callable[[int], float], updates: int, servers: Callable[[], list[int]], clients: list[int]) -> dict[str, float]:
    """Seconds and CPU seconds of a round, after another one; ``work`` gives the mean's first number."""
    work(min(updates, WARM))
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
    path = f"/tmp/hanse-bench-{os.getpid()}" if who == LOCAL else "-"
    with ExitStack() as stack:
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
        found = {**timed(work, updates, lambda: pids, [clients.process.pid]), "memory": memory(pids)}
    if path != "-":
        Path(path).unlink()
    return found


def bound(size: int, seconds: float = 1.0) -> float:
    """Bytes a second that a plain loop reads and accumulates on all cores: the best of some."""
    torch.set_num_threads(CORES)
    buffers, sums = sources(size), torch.zeros(size)
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        start = time.perf_counter()
        for x in buffers:
            sums.add_(x)
        best = max(best, len(buffers) * sums.nbytes / (time.perf_counter() - start))
    return best


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
        return {"bytes_s": bound(size)}
    if who == LARGE:
        found, updates, size = exchange(size), 2 * CLIENTS, size
    elif who == FLAT:
        found = ours(COPIED, updates, size, workers=1, fan_in=3, room=4)
    else:
        found = (ours if who in (IN_PLACE, COPIED) else theirs)(who, updates, size)
    return {"case": who, "updates": updates, "size": size, **found, "updates_s": updates / found["seconds"]}


HEADERS = (
    "case", "updates", "numbers", "s", "updates/s", "GB/s", "of the bound", "of one aggregator",
    "CPU s", "clients' CPU s", "peak MB", "models", "copies",
)  # fmt: skip


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row for people."""
    model = 4 * row["size"]
    return (
        row["case"],
        f"{row['updates']:,}",
        f"{row['size']:,}",
        f"{row['seconds']:.3f}",
        f"{row['updates_s']:.1f}",
        f"{row['updates_s'] * model / 1e9:.2f}",
        f"{row['updates_s'] * model / row['bound']:.2f}",
        f"{row['updates_s'] / row['one']:.2f}" if "one" in row else "",
        f"{row['cpu_s']:.2f}",
        f"{row['client_cpu_s']:.2f}",
        f"{row['memory'] / 1e6:.0f}",
        f"{row['memory'] / model:.2f}",
        f"{COPIES.get(row['case'], 1)}",
    )


def rows(repeats: int, one: Callable[[list[str]], dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest of each case, in turn; of more than 10 GB each is run once. ``one`` runs a command and gives its last line."""

    def run(who: str, updates: int, size: int) -> dict[str, Any]:
        return one([sys.executable, "-m", "hanse.bench.aggregation", json.dumps({"who": who, "updates": updates, "size": size})])

    table = []
    for updates, size in ROWS:
        best: dict[str, dict[str, Any]] = {}
        limit = 0.0
        for _ in range(repeats if 4 * size * updates <= 10e9 else 1):
            limit = max(limit, run("bound", 0, size)["bytes_s"])
            for who in COPIES:
                found = run(who, updates, size)
                if who not in best or found["seconds"] < best[who]["seconds"]:
                    best[who] = found
        firsts = [row["first"] for row in best.values()]
        if max(firsts) - min(firsts) > 1e-4:
            raise HanseError(f"not the same mean: {dict(zip(best, firsts, strict=True))}")
        table += [{**row, "bound": limit, "one": best[ONE]["updates_s"]} for row in best.values()]
    limit = run("bound", 0, 25_000_000)["bytes_s"]
    return [*table, *({**run(*case), "bound": limit} for case in ((FLAT, 1000, 25_000_000), (LARGE, 0, MODEL)))]


def main(words: Sequence[str]) -> None:
    """A process of a case, or the case itself."""
    torch.set_num_threads(1)
    if words[0] == "clients":
        play_clients(int(words[1]))
    elif words[0] == "client":
        play_client(int(words[1]), int(words[2]))
    elif words[0] == "receiver":
        play_receiver(int(words[1]), words[2])
    else:
        from hanse.engines.execution import keep_freed_memory

        keep_freed_memory()
        print(json.dumps(measure(**json.loads(words[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
