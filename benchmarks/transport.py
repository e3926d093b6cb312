"""Chunked transport against ``sendall`` and ``recv_into``: 256 MiB of float32 between two processes over loopback, in turns.

    python benchmarks/transport.py [TURNS]

Prints GB/s (median, lowest, highest; the first turn does not count), CPU seconds per GiB, and what memory the ends took beside the
256 MiB of each. With ucxx installed and UCX_TLS set, by UCX too.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import resource
import socket
import sys
import time
from multiprocessing.connection import Connection
from statistics import median

import torch

from hanse.transport.peers import Link, Listener
from hanse.transport.sources import message

SIZE, TOKEN = 256 << 20, b"a token for nobody outside of here"
UCX = ("ucx",) if importlib.util.find_spec("ucxx") and "UCX_TLS" in os.environ else ()


def cpu() -> float:
    """Seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak() -> float:
    """The most MiB this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def receive(pipe: Connection) -> None:
    """Receive what the other process says it sends; answer with CPU seconds."""
    memory = torch.ones(SIZE + 4096, dtype=torch.uint8)
    with (
        Listener(job=1, token=TOKEN, memory=lambda name, size: memory[:size], ways=(*UCX, "shared", "inline")) as listener,
        socket.create_server(("127.0.0.1", 0)) as plain,
    ):
        pipe.send((listener.address, plain.getsockname()))
        sock, _ = plain.accept()
        before = peak()
        while (way := pipe.recv()) != "end":
            began = cpu()
            if way == "plain":
                view = memory.numpy().data[:SIZE]
                while len(view):
                    view = view[sock.recv_into(view) :]
                sock.sendall(b"!")
            else:
                listener.get(60)
            pipe.send(cpu() - began)
        pipe.send(peak() - before)


def main(turns: int) -> None:
    """Send by every way in turns, and print what it took."""
    torch.set_num_threads(1)
    pipe, theirs = multiprocessing.Pipe()
    receiver = multiprocessing.get_context("spawn").Process(target=receive, args=(theirs,))
    receiver.start()
    address, plain = pipe.recv()
    sock = socket.create_connection(plain)
    tensors = {"x": torch.randn((SIZE >> 2) - 32)}
    whole = memoryview(bytearray(SIZE))
    before = peak()
    links = {
        f"{way}, {digest}": Link(address, job=1, token=TOKEN, ways=(way,), digest=digest)
        for way in ("inline", "shared", *UCX)
        for digest in ("crc32", "sha256")
    }
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ("plain", *links)}
    for number in range(turns):
        for place, (way, rows) in enumerate(found.items()):
            pipe.send(way)
            time.sleep(0.05)
            used, began = cpu(), time.perf_counter()
            if way == "plain":
                sock.sendall(whole)
                sock.recv(1)
            else:
                links[way].put(message(tensors), number, place)
            took, mine = time.perf_counter() - began, cpu() - used
            gib = SIZE / (1 << 30)
            rows.append((SIZE / 1e9 / took, mine / gib, pipe.recv() / gib))
    for way, rows in found.items():
        speeds, mine, theirs_too = zip(*rows[1:] or rows, strict=True)
        print(
            f"{way:15} {median(speeds):.2f} GB/s ({min(speeds):.2f} to {max(speeds):.2f}); CPU seconds per GiB: sender"
            f" {median(mine):.2f}, receiver {median(theirs_too):.2f}"
        )
    for link in links.values():
        link.close()
    pipe.send("end")
    print(f"memory beside the message: sender {peak() - before:.0f} MiB, receiver {pipe.recv():.0f} MiB")
    receiver.join()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
