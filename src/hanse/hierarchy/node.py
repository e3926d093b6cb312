"""A node: its store, the aggregators' processes beside it, the tasks that wait for one, and what its sidecar has measured."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hanse.core.errors import TransportError
from hanse.hierarchy import plan
from hanse.hierarchy.events import Event
from hanse.hierarchy.plan import Role
from hanse.hierarchy.store import Store

if TYPE_CHECKING:
    from hanse.hierarchy.task import Task

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Worker:
    """An aggregator's process, as the service sees it. Raises ``TransportError`` where it cannot be started."""

    def __init__(self, node: Node, idle: float) -> None:
        self.node, self.role, self.born = node, Role.LEAF, time.monotonic()
        self.task: Task | None = None
        (self.control, control), (self.data, data) = socket.socketpair(), socket.socketpair()
        fds = control.fileno(), data.fileno()
        command = [sys.executable, "-m", "hanse.hierarchy.aggregator", *map(str, (*fds, idle, node.store.size))]
        for dtype, blocks in zip(node.store.dtypes, node.store.shelves, strict=True):
            command += [str(dtype).removeprefix("torch."), str(blocks.folder)]
        env = {**os.environ, **ONE_THREAD}
        with control, data:
            try:
                # In a group of its own, because Ctrl-C is for the service, which then ends this one.
                self.process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, env=env, process_group=0)
            except OSError as error:
                raise TransportError(f"aggregators: {sys.executable} cannot be started: {error.strerror}") from None

    def tell(self, events: Sequence[Event]) -> None:
        """Send events, unless it has ended: its socket says so when it is read."""
        with suppress(ConnectionError):
            self.control.sendall(b"".join(event.pack() for event in events))


@dataclass(eq=False)
class Node:
    """Node ``number`` of a service."""

    number: int
    store: Store
    workers: list[Worker] = field(default_factory=list)
    waiting: list[Task] = field(default_factory=list)
    queue: float | None = None
    """Q_i, smoothed."""
    arrived: int = 0
    """Updates of this round."""
    done: int = 0
    """Means of this round, of which each took ``busy / done`` seconds."""
    busy: float = 0.0

    def estimate(self, seconds: float) -> None:
        """Take a round of so many seconds into the queue estimate."""
        self.queue = plan.smoothed(self.queue, self.arrived / seconds, self.busy / max(self.done, 1))
