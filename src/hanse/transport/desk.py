"""What a receiver has of which streams, over all its connections: how much it may take, what is whole, what is going on."""

from __future__ import annotations

import base64
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hanse.core.errors import CodecError, ConfigError, TransportError
from hanse.transport.frames import WIDEST, Name, Said
from hanse.transport.journal import Journal
from hanse.transport.stream import Counters, Plan, Receiver
from hanse.transport.tcp import Channel

Memory = Callable[[Name, int], Tensor]
"""Gives the memory for a stream of a name and a size: uint8, contiguous, on the CPU, exactly as long."""

_REMEMBERED = 4096


def own_memory(name: Name, size: int) -> Tensor:
    """New memory for every stream."""
    return torch.empty(size, dtype=torch.uint8)


class Incoming:
    """A stream that is being received, by one connection at a time."""

    def __init__(self, plan: Plan, memory: Tensor, journal: Journal | None) -> None:
        self.plan, self.memory, self.journal = plan, memory, journal
        self.receiver = Receiver(plan, memory.numpy().data, journal.digests if journal else None)
        self.finished = False
        self._lock = threading.Lock()
        self._channel: Channel | None = None

    @contextmanager
    def owned(self, channel: Channel) -> Iterator[None]:
        """For the connection that receives it from now on; the one that did so far is cut."""
        self._cut()
        with self._lock:
            self._channel = channel
            try:
                yield
            finally:
                self._channel = None

    def end(self, keep: bool) -> None:
        """Nobody receives it any more; ``keep``: what there is stays for the next one who does."""
        self._cut()
        with self._lock:
            if self.journal:
                self.journal.close(keep)

    def _cut(self) -> None:
        channel = self._channel
        if channel:
            channel.abort()

    @property
    def counters(self) -> Counters:
        """What its receiver has counted."""
        return self.receiver.counters

    def have(self) -> str:
        """What has arrived, for a control message."""
        return base64.b64encode(self.receiver.arrived.pack()).decode()

    def add(self, index: int, digest: bytes) -> None:
        """Write down a chunk that has arrived, before it is acknowledged."""
        if self.journal:
            self.journal.add(index, digest)

    def void(self) -> None:
        """Start over."""
        self.receiver.void()
        if self.journal:
            self.journal.void()


def opening(message: Said) -> tuple[Plan, int]:
    """The stream that a message announces, and the window its sender would like. Raises ``CodecError``."""
    plan = Plan(message.name, message.get("size", int), message.get("chunk", int), message.get("digest", str))
    try:
        plan.check()
    except ConfigError as error:
        raise CodecError(f"no such stream: {error}") from None
    window = message.get("window", int)
    if not 0 < window <= WIDEST:
        raise CodecError(f"a window of {window} chunks; 1 to {WIDEST} are allowed")
    return plan, window


class Desk:
    """The streams of one job. ``limit``: bytes of all that are not whole or not collected yet; what would be more is refused.

    With ``folder`` streams are kept in files until they are whole.
    """

    def __init__(self, job: int, limit: int, memory: Memory = own_memory, folder: Path | None = None) -> None:
        self.job, self.limit = job, limit
        self._new, self._folder = memory, folder
        self._lock = threading.Lock()
        self._open: dict[Name, Incoming] = {}
        self._done: OrderedDict[Name, tuple[Plan, str]] = OrderedDict()
        self._waiting = 0

    def open(self, plan: Plan) -> Incoming | str:
        """The stream to be received, which goes on where it was; or the digest of one that was received whole.

        Raises ``TransportError``, with the reason in words for the sender, if it is not wanted here.
        """
        name = plan.name
        if name.job != self.job:
            raise TransportError(f"job {name.job} is not received here")
        with self._lock:
            if name in self._done and self._done[name][0] == plan:
                return self._done[name][1]
            incoming = self._open.get(name)
            if incoming and incoming.plan == plan:
                return incoming
        self.forget(name)
        with self._lock:
            taken = self._waiting + sum(i.plan.size for i in self._open.values())
            if plan.size > self.limit - taken:
                raise TransportError(f"{name} has {plan.size:,} bytes; {self.limit:,} are taken at a time, {taken:,} of them now")
            journal = Journal(self._folder, plan) if self._folder else None
            memory = journal.memory if journal else self._new(name, plan.size)
            if memory.dtype != torch.uint8 or memory.numel() != plan.size or not memory.is_contiguous() or memory.is_cuda:
                raise TransportError(f"{name}: there is no memory for its {plan.size:,} bytes")
            self._open[name] = Incoming(plan, memory.view(-1), journal)
            return self._open[name]

    def finish(self, incoming: Incoming) -> None:
        """It is whole, and waits until it is ``collected``. For the connection that owns it."""
        with self._lock:
            name = incoming.plan.name
            if self._open.get(name) is incoming:
                del self._open[name]
            self._done[name] = (incoming.plan, incoming.receiver.digest)
            while len(self._done) > _REMEMBERED:
                self._done.popitem(last=False)
            self._waiting += incoming.plan.size
            incoming.finished = True
        if incoming.journal:
            incoming.journal.close(keep=False)

    def arrived(self, name: Name) -> int:
        """How many chunks there are of a stream that is not whole."""
        incoming = self._open.get(name)
        return len(incoming.receiver.arrived) if incoming else 0

    def collected(self, size: int) -> None:
        """Somebody took a stream of this size, which does not count any more."""
        with self._lock:
            self._waiting -= size

    def forget(self, name: Name) -> None:
        """Give up what there is of a stream, whole or not; its sender may begin it anew."""
        with self._lock:
            self._done.pop(name, None)
            incoming = self._open.pop(name, None)
        if incoming:
            incoming.end(keep=False)

    def close(self) -> None:
        """Let go of the files, which stay for the next one who receives these streams."""
        with self._lock:
            left, self._open = list(self._open.values()), {}
        for incoming in left:
            incoming.end(keep=True)
