"""Receivers in processes of their own."""

from __future__ import annotations

import subprocess
import sys

TOKEN = b"a token for tests, of 32 bytes.."

RECEIVER = """
import hashlib, os, signal, sys
from pathlib import Path
from hanse.transport.peers import Listener
from hanse.transport.tcp import Channel

port, folder, killed = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
send, acks = Channel.send, 0

def counted(self, *parts):
    global acks
    send(self, *parts)
    acks += len(parts) == 1 and len(parts[0]) == 16
    if acks and acks == killed:
        os.kill(os.getpid(), signal.SIGKILL)

Channel.send = counted
print("ready", flush=True)
sys.stdin.readline()
with Listener(("127.0.0.1", port), job=1, token=sys.argv[4], folder=Path(folder) if folder else None) as listener:
    print(listener.address[1], flush=True)
    while True:
        arrival = listener.get()
        print(arrival.name.number, hashlib.sha256(arrival.memory.numpy()).hexdigest(), arrival.counters.chunks, flush=True)
"""


class Receiver:
    """A process that listens, once ``start`` is called, and says what arrives; dies after ``killed`` acknowledgements, if not 0."""

    def __init__(self, folder: str = "", killed: int = 0, port: int = 0) -> None:
        given = [str(port), folder, str(killed), TOKEN.decode()]
        self.process = subprocess.Popen(
            [sys.executable, "-c", RECEIVER, *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self) -> tuple[str, int]:
        """Its address."""
        assert self._line() == ["ready"]
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return "127.0.0.1", int(self._line()[0])

    def arrived(self) -> tuple[int, str, int]:
        """Number, SHA-256 and chunk frames of the next stream."""
        number, digest, chunks = self._line()
        return int(number), digest, int(chunks)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _line(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()
