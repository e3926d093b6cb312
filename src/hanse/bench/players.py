"""What takes part in ``hanse bench aggregation`` beside the server: clients, and aggregators that receive over sockets.

Processes that stand for the clients have a few source buffers, 400 MB of them or two, and at most 32, and send each again and
again, so that updates never exist all at once.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanse.core.streams import Streams
from hanse.core.wire import pieces, read, wire_size
from hanse.transport.blocks import attach

SOURCES, MOST = 400_000_000, 32
"""Bytes that the clients' buffers hold together, and buffers, at most; but two at least."""


def held(size: int) -> int:
    """How many buffers a process of clients has."""
    return min(max(2, SOURCES // (4 * size)), MOST)


def sources(size: int) -> list[Tensor]:
    """The clients' buffers."""
    return [torch.randn(size, generator=Streams(i).torch("workload")) for i in range(held(size))]


class Child:
    """One of these processes, that reads commands and writes answers, a line each."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "hanse.bench.players", *map(str, arguments)]
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
        self.process.kill()  # it might wait for another one that has ended
        self.process.communicate()


def commands() -> Iterator[list[str]]:
    """What the parent asks for, after saying that all is ready."""
    print("ready", flush=True)
    for line in sys.stdin:
        yield line.split()


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


def play_receiver(size: int, path: str) -> None:
    """An always-on aggregator on a TCP port (``path`` is ``-``) or a local socket, with one thread.

    ``N CONNECTIONS [PARENT]``: receive N updates, add each, and send the mean to a parent or keep it.
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
                more = s.recv_into(view[got:])
                if not more:
                    raise EOFError(f"{got:,} of {length:,} bytes have come")
                got += more
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["clients", size]:
            play_clients(int(size))
        case ["client", size, segment]:
            play_client(int(size), int(segment))
        case ["receiver", size, path]:
            play_receiver(int(size), path)
