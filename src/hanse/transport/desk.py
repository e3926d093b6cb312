"""What a receiver has of which streams, over all its connections: how much it may take, what is whole, what is going on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from hanse.core.errors import CodecError, ConfigError, TransportError
from hanse.transport.frames import WIDEST, Name, Said
from hanse.transport.journal import Journal
from hanse.transport.stream import Plan, Receiver
from hanse.transport.tcp import Channel

Memory = Callable[[Name, int], Tensor]
"""Gives the memory for a stream of a name and a size: uint8, contiguous, on the CPU, exactly as long."""

MOST_STREAMS = 1 << 16
"""Streams at a time, however short they are."""
_REMEMBERED = 4096


def own_memory(name: Name, size: int) -> Tensor:
    """New memory for every stream."""
    return torch.empty(size, dtype=torch.uint8)


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


class Incoming:
    """A stream that is being received, by one connection at a time, until it is ``over``: whole, or given up."""

    def __init__(self, plan: Plan, memory: Tensor, journal: Journal | None) -> None:
        self.plan, self.memory, self.journal = plan, memory, journal
        self.receiver = Receiver(plan, memory.numpy().data, journal)
        self.over = False
        self._lock = threading.Lock()
        self._channel: Channel | None = None

    @contextmanager
    def owned(self, channel: Channel | None) -> Iterator[None]:
        """For the connection that receives it from now on; whichever did so far is cut. Raises ``OSError`` if it is over."""
        taken = False
        while not taken:
            if owner := self._channel:
                owner.abort()
            taken = self._lock.acquire(timeout=0.05)  # and then again: another one may have come to own it
        try:
            if self.over:
                raise ConnectionAbortedError(f"{self.plan.name} was received or given up in the meantime")
            self._channel = channel
            yield
        finally:
            self._channel = None
            self._lock.release()

    def end(self, keep: bool) -> None:
        """Nobody receives it any more, its owner says; ``keep``: what there is stays for the next one who does."""
        self.over = True
        if self.journal is not None:
            self.journal.close(keep)


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
        self._uncollected = self._waiting = 0  # streams, and their bytes

    def open(self, plan: Plan) -> Incoming | str:
        """The stream to be received, which goes on where it was; or the digest of one that was received whole.

        Raises ``TransportError``, with the reason in words for the sender, if it is not wanted here.
        """
        if plan.name.job != self.job:
            raise TransportError(f"job {plan.name.job} is not received here")
        while True:
            with self._lock:
                done, digest = self._done.get(plan.name, (None, ""))
                if done == plan:
                    return digest
                incoming = self._open.get(plan.name)
                if incoming is None:
                    incoming = self._open[plan.name] = self._opened(plan)
                if incoming.plan == plan:
                    return incoming
            self.forget(plan.name)  # another stream of that name

    def _opened(self, plan: Plan) -> Incoming:
        taken = self._waiting + sum(i.plan.size for i in self._open.values())
        if plan.size > self.limit - taken:
            raise TransportError(f"{plan.name} has {plan.size:,} bytes; {self.limit:,} are taken at a time, {taken:,} of them now")
        if self._uncollected + len(self._open) >= MOST_STREAMS:
            raise TransportError(f"{plan.name}: {MOST_STREAMS:,} streams are taken at a time")
        if self._folder:
            journal = Journal(self._folder, plan)
            return Incoming(plan, journal.memory, journal)
        try:
            memory = self._new(plan.name, plan.size)
        except Exception as error:  # whatever the caller's function raises
            raise TransportError(f"{plan.name}: there is no memory for its {plan.size:,} bytes: {error!r:.200}") from None
        if memory.dtype != torch.uint8 or memory.numel() != plan.size or not memory.is_contiguous() or memory.device.type != "cpu":
            raise TransportError(f"{plan.name}: there is no memory for its {plan.size:,} bytes")
        return Incoming(plan, memory.view(-1), None)

    def finish(self, incoming: Incoming) -> None:
        """It is whole, and waits until it is ``collected``. For the connection that owns it."""
        with self._lock:
            name = incoming.plan.name
            self._open.pop(name, None)
            self._done[name] = (incoming.plan, incoming.receiver.digest)
            if len(self._done) > _REMEMBERED:
                self._done.popitem(last=False)
            self._uncollected += 1
            self._waiting += incoming.plan.size
        incoming.end(keep=False)

    def arrived(self, name: Name) -> int:
        """How many chunks there are of a stream that is not whole."""
        incoming = self._open.get(name)
        return len(incoming.receiver.arrived) if incoming else 0

    def collected(self, size: int) -> None:
        """Somebody took a stream of this size, which does not count any more."""
        with self._lock:
            self._uncollected -= 1
            self._waiting -= size

    def forget(self, name: Name, keep: bool = False) -> None:
        """Give up what there is of a stream, whole or not; its sender may begin it anew. ``keep``: its files stay."""
        with self._lock:
            self._done.pop(name, None)
            incoming = self._open.get(name)
        if incoming:
            with suppress(ConnectionAbortedError), incoming.owned(None):
                incoming.end(keep)
            with self._lock:  # not before its files are gone, which another stream of that name may make anew
                if self._open.get(name) is incoming:
                    del self._open[name]

    def close(self) -> None:
        """Let go of the files, which stay for the next one who receives these streams."""
        for name in list(self._open):
            self.forget(name, keep=True)
