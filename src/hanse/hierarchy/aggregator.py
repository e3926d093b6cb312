"""An aggregator: a process that waits for events on a socket, adds what they name, and says where the mean is.

Leaf, middle and top are the same program: it knows no role and keeps nothing from one mean to the next. It adds what has arrived at
once, in one pass, as soon as something has; while nothing has it is blocked. Without work for ``idle`` seconds it ends, as it does
when its service is gone.

Started by the service as ``python -m hanse.hierarchy.aggregator CONTROL DATA IDLE SIZE DTYPE FOLDER DTYPE FOLDER``.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence

from hanse.hierarchy.events import SIZE, Event, Kind, Shelf, unpack
from hanse.hierarchy.partial import Partial, Vector


class Aggregator:
    """One mean after the other, in shared memory; ``take`` is told everything that has arrived together."""

    def __init__(self, control: socket.socket, data: socket.socket, shelves: Sequence[Shelf]) -> None:
        self.control, self.data, self.shelves = control, data, shelves
        self.partial: Partial | None = None
        self._out, self._busy = Event(Kind.DONE), 0
        self._updates: list[Vector] = []
        self._weights: list[float] = []

    def take(self, events: Sequence[Event]) -> None:
        """Do what ``events`` ask for."""
        for event in events:
            shelf = self.shelves[event.shelf]
            match event.kind:
                case Kind.START:
                    self.partial = Partial(shelf.view(event.block))
                    self._out, self._busy = event, 0
                case Kind.INPUT:
                    self._updates.append(shelf.view(event.block))
                    self._weights.append(event.weight)
                case Kind.CLOSE:
                    self._add(last=True)
                case Kind.SEND:
                    self.data.sendall(memoryview(shelf.view(event.block)))  # type: ignore[arg-type]
                case Kind.FORGET:
                    shelf.forget(event.block)
        if self._updates:
            self._add(last=False)

    def _add(self, last: bool) -> None:
        assert self.partial is not None
        began = time.perf_counter_ns()
        (self.partial.finish if last else self.partial.add)(self._updates, self._weights)
        self._updates, self._weights = [], []
        self._busy += time.perf_counter_ns() - began
        if last:
            done = self._out._replace(kind=Kind.DONE, number=self._busy, weight=self.partial.weight)
            self.partial = None
            self.control.sendall(done.pack())


def serve(control: socket.socket, data: socket.socket, idle: float, shelves: Sequence[Shelf]) -> None:
    """Work until nothing has come for ``idle`` seconds, or nothing will."""
    aggregator, received = Aggregator(control, data, shelves), b""
    while True:
        control.settimeout(idle if aggregator.partial is None else None)
        try:
            arrived = control.recv(1024 * SIZE)
        except (TimeoutError, ConnectionError):
            return
        if not arrived:
            return
        received += arrived
        whole = len(received) - len(received) % SIZE
        events, received = list(unpack(received[:whole])), received[whole:]
        control.settimeout(None)
        try:
            aggregator.take(events)
        except ConnectionError:
            return


if __name__ == "__main__":
    control, data, idle, size, *pairs = sys.argv[1:]
    serve(
        socket.socket(fileno=int(control)),
        socket.socket(fileno=int(data)),
        float(idle),
        [Shelf(folder, dtype, int(size)) for dtype, folder in zip(pairs[::2], pairs[1::2], strict=True)],
    )
