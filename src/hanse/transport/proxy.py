"""A bad link on one machine: a proxy before a listener that adds delay, limits bandwidth, harms chunks and cuts connections.

It stands for a pipe, not for a pause: a byte leaves when those before it have left at the bandwidth, and arrives half the RTT
later, while more are let in. What waits for the bottleneck is bounded, so that a sender is held up as it would be. A chunk of s
bytes is damaged (a bit of its payload flips) or lost (it takes its time and never arrives) with probability 1 - (1 - q)^s; headers
and control messages arrive. It reads frames, so it cannot look into TLS, which it passes on with ``loss=0`` only.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from math import inf

import numpy as np

from hanse.core.errors import CodecError
from hanse.transport.frames import CONTROL, HEADER, INLINE, Frame
from hanse.transport.tcp import Address, connect, fill, listen
from hanse.transport.timing import survives

_SEGMENT = 1 << 16
_BUFFER = 1 << 18


@dataclass(frozen=True)
class Conditions:
    """``rtt`` in seconds, ``bandwidth`` in bytes per second each way, ``loss`` q per byte; ``drop``: lost instead of damaged."""

    rtt: float = 0.0
    bandwidth: float = inf
    loss: float = 0.0
    drop: bool = False


class _Pipe:
    """One direction: whoever puts bytes in waits for room before the bottleneck; a thread takes them out when they arrive."""

    def __init__(self, target: socket.socket, conditions: Conditions) -> None:
        self._target, self._conditions = target, conditions
        self._free = 0.0  # when the bottleneck has nothing more to do
        self._line: queue.SimpleQueue[tuple[float, memoryview | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._arrive, name="hanse-pipe", daemon=True)
        self._thread.start()

    def put(self, data: memoryview, arrives: bool = True) -> None:
        """Let ``data`` in."""
        self._free = max(time.monotonic(), self._free) + len(data) / self._conditions.bandwidth
        if arrives:
            self._line.put((self._free + self._conditions.rtt / 2, data))
        ahead = self._free - time.monotonic() - _BUFFER / self._conditions.bandwidth
        if ahead > 0:
            time.sleep(ahead)

    def close(self) -> None:
        """Nothing more comes; returns when everything has arrived."""
        self._line.put((0.0, None))
        self._thread.join()

    def _arrive(self) -> None:
        with suppress(OSError):
            while True:
                due, data = self._line.get()
                if data is None:
                    break
                wait = due - time.monotonic()
                if wait > 0:
                    time.sleep(wait)
                self._target.sendall(data)
            self._target.shutdown(socket.SHUT_WR)


class Proxy:
    """Takes connections at ``address`` and passes them on to ``target`` under ``conditions``, which may be changed for new ones.

    The k-th connection is cut when ``cuts[k]`` bytes have been let in towards the target. ``up`` and ``down`` count bytes that came
    in from the dialer and from the target.
    """

    def __init__(
        self, target: Address, conditions: Conditions, generator: np.random.Generator | None = None, cuts: Sequence[int] = ()
    ) -> None:
        self.target, self.conditions = target, conditions
        self.up = self.down = 0
        self._generator = generator or np.random.default_rng(0)
        self._cuts = list(cuts)
        self._open: set[socket.socket] = set()
        self._sock = listen(("127.0.0.1", 0))
        self.address: Address = self._sock.getsockname()[:2]
        threading.Thread(target=self._accept, name="hanse-proxy", daemon=True).start()

    def cut(self) -> None:
        """Cut all connections."""
        for sock in list(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections and cut those there are."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self.cut()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                dialer, _ = self._sock.accept()
                threading.Thread(target=self._pass, args=(dialer,), name="hanse-proxy", daemon=True).start()

    def _pass(self, dialer: socket.socket) -> None:
        with dialer:
            try:
                target = connect(self.target)
            except OSError:
                return
            with target:
                pair = (dialer, target)
                for sock in pair:
                    if sock.family != socket.AF_UNIX:
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open.update(pair)
                back = threading.Thread(target=self._back, args=pair, name="hanse-proxy", daemon=True)
                back.start()
                self._there(dialer, target, self._cuts.pop(0) if self._cuts else inf)
                back.join()
                self._open.difference_update(pair)

    def _there(self, dialer: socket.socket, target: socket.socket, cut: float) -> None:
        """Pass on frames from the dialer, some of them damaged, until it ends or is cut."""
        conditions, before = self.conditions, self.up
        with suppress(OSError, CodecError), closing(_Pipe(target, conditions)) as pipe:
            if conditions.loss == 0 and cut == inf:
                while data := dialer.recv(_SEGMENT):
                    self.up += len(data)
                    pipe.put(memoryview(data))
                return
            while self.up - before < cut:
                header = self._read(dialer, HEADER.size)
                frame = Frame.parse(header)
                harmed = frame.flags != CONTROL and self._generator.random() >= survives(frame.length, conditions.loss)
                flip = int(self._generator.integers(max(1, frame.length))) if harmed else -1
                arrives = not (harmed and conditions.drop)
                pipe.put(header, arrives)
                for start in range(0, frame.length if frame.flags in (INLINE, CONTROL) else 0, _SEGMENT):
                    part = self._read(dialer, min(_SEGMENT, frame.length - start))
                    if start <= flip < start + len(part):
                        part[flip - start] ^= 1
                    pipe.put(part, arrives)
                    if self.up - before >= cut:
                        break
            for sock in (dialer, target):
                sock.shutdown(socket.SHUT_RDWR)

    def _read(self, dialer: socket.socket, size: int) -> memoryview:
        view = memoryview(bytearray(size))
        fill(dialer, view)
        self.up += size
        return view

    def _back(self, dialer: socket.socket, target: socket.socket) -> None:
        """Pass on what the target answers."""
        with suppress(OSError), closing(_Pipe(dialer, self.conditions)) as pipe:
            while data := target.recv(_SEGMENT):
                self.down += len(data)
                pipe.put(memoryview(data))
