"""One stream over one connection: the loops that drive ``Sender`` and ``Receiver``, and what both sides say before and after.

    sender    open {size, chunk, digest, window, ways}
    receiver  go {have, shared, ucx}           or    refused {reason}
    sender    chunks ...                             receiver  acknowledgements ...
    sender    done {digest}
    receiver  taken {}                         or    void {}: the digest is another, so nothing that has arrived counts

After ``void`` the sender sends everything again, once. Who dials makes no difference to this.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from torch import Tensor

from hanse.core import wire
from hanse.core.errors import CodecError, TransportError
from hanse.transport import ucx
from hanse.transport.blocks import Blocks
from hanse.transport.desk import Desk, Incoming, opening
from hanse.transport.frames import ACK, CONTROL, SHARED, UCX, WIDEST, Frame, Name, Said, control
from hanse.transport.shared import Slots, Writer, copy
from hanse.transport.sources import Ahead, Source
from hanse.transport.stream import Arrived, Counters, Pace, Plan, Sender, verified
from hanse.transport.tcp import Channel, inline

log = logging.getLogger(__name__)

WAYS = ("ucx", "shared", "inline")
"""How payloads may travel, the nearest to the hardware first."""
SMALL = 1 << 16
"""Chunks below are checked by the thread that receives them: handing them over would take longer."""
Carrier = Callable[[Channel, Frame, Sequence[memoryview]], int]
"""Sends a frame by one of the ways; the bytes that took on the connection."""


class Outbox:
    """The sending side of one connection, and what it keeps from stream to stream: the ways that were found to work."""

    def __init__(self, channel: Channel, ways: Sequence[str]) -> None:
        self.channel = channel
        self.ways = [way for way in ways if way != "shared" or channel.local]
        self._writer: tuple[object, Writer] | None = None  # and the offer that it was made of
        self._ucx: ucx.Sender | None = None

    def carrier(self, go: Said) -> Carrier:
        """The nearest way to the hardware of those that the receiver offers."""
        for way, made in (("ucx", self._by_ucx), ("shared", self._by_shared)):
            if way in self.ways and way in go.fields:
                try:
                    return made(Said(go.name, way, go.get(way, dict)))
                except TransportError as error:
                    log.info("%s: not by %s: %s", go.name, way, error)
        return inline

    def close(self) -> None:
        """The connection is gone."""
        if self._ucx:
            self._ucx.close()

    def _by_ucx(self, offer: Said) -> Carrier:
        self._ucx = self._ucx or ucx.Sender(self.channel.host, offer)
        return self._ucx.send

    def _by_shared(self, offer: Said) -> Carrier:
        if self._writer is None or self._writer[0] != offer.fields:
            self._writer = offer.fields, Writer(offer)
        return self._writer[1].send


class Outgoing:
    """A stream on its way, across as many connections as that takes."""

    def __init__(self, plan: Plan, source: Source, window: int, pace: Pace, tries: int) -> None:
        self.sender = Sender(plan, window, pace, tries)
        self._source = source
        self._ahead: Ahead | None = None
        self._voided = False

    def push(self, outbox: Outbox) -> None:
        """Send what is missing, until the receiver has said that it has everything.

        Raises ``OSError`` or ``CodecError`` where another connection may help, ``TransportError`` where not.
        """
        channel, sender, counters = outbox.channel, self.sender, self.sender.counters
        before = channel.sent + channel.received - counters.wire - counters.control
        counters.connections += 1
        try:
            carrier = self._open(outbox)
            while not self._taken(channel, carrier):
                if self._voided:
                    raise TransportError(f"{sender.plan.name}: twice the receiver had something else than was sent")
                log.warning("%s: the receiver has something else than was sent; all is sent again", sender.plan.name)
                self._voided = True
                self._resume(Arrived(sender.plan.count))
        finally:
            counters.control = channel.sent + channel.received - counters.wire - before

    def close(self) -> None:
        """Stop making chunks."""
        if self._ahead:
            self._ahead.close()
            self._ahead = None

    def _open(self, outbox: Outbox) -> Carrier:
        """Announce the stream and hear what has arrived; the way its payloads will take."""
        channel, sender, plan = outbox.channel, self.sender, self.sender.plan
        asked = time.monotonic()
        shape = {"size": plan.size, "chunk": plan.chunk, "digest": plan.digest, "window": sender.window}
        channel.send(control(plan.name, "open", **shape, ways=outbox.ways))
        go = _said(channel, "go")
        sender.pace.answered(time.monotonic() - asked)
        self._resume(Arrived.unpack(go.get("have", str), plan.count))
        return outbox.carrier(go)

    def _resume(self, arrived: Arrived) -> None:
        """Go on from what has arrived; the source starts over where chunks are missing that are not held any more."""
        freed = self.sender.resume(arrived)
        if freed is None:
            self.close()
        if self._ahead:
            self._ahead.free(freed or 0)
        else:
            self._ahead = Ahead(self.sender.plan, self._source, self.sender.window, arrived.bits)

    def _taken(self, channel: Channel, carrier: Carrier) -> bool:
        """Send the chunks; whether the receiver then has what was sent."""
        sender = self.sender
        began, resent, there = time.monotonic(), sender.counters.resent, len(sender.arrived)
        self._run(channel, carrier)
        sent = (len(sender.arrived) - there) * min(sender.plan.chunk, sender.plan.size)
        sender.pace.delivered(sent, sender.counters.resent - resent, time.monotonic() - began)
        log.debug("%s: %d bytes; a window of %d; %s", sender.plan.name, sent, sender.window * sender.plan.chunk, sender.pace)
        channel.send(control(sender.plan.name, "done", digest=sender.digest))
        return _said(channel, "taken", "void").say == "taken"

    def _run(self, channel: Channel, carrier: Carrier) -> None:
        sender, ahead, clock = self.sender, self._ahead, time.monotonic
        assert ahead is not None
        while True:
            while channel.ready():
                answer = channel.answer()
                if isinstance(answer, Said):
                    raise CodecError(f"an acknowledgement must come now, not {answer.say!r:.40}")
                sender.counters.wire += ACK.size
                ahead.free(sender.acknowledged(answer, clock()))
            for chunk in ahead.take():
                if not sender.hold(chunk) and chunk.parts:
                    ahead.free(1)
            if sender.over:
                return
            todo = sender.next(clock())
            if todo:
                sender.counters.wire += carrier(channel, *todo)
                sender.left(clock())
            elif sender.spent is None:
                until = sender.deadline
                channel.ready(None if until is None else until - clock(), ahead.wake)
            elif carrier is inline:
                raise ConnectionAbortedError(f"chunk {sender.spent} was lost {sender.tries} times")
            else:
                log.warning("%s: chunk %d was lost %d times; the rest goes by TCP", sender.plan.name, sender.spent, sender.tries)
                carrier = inline
                sender.forgive()


def _said(channel: Channel, *expected: str) -> Said:
    """The next control message; acknowledgements of what was sent twice may come before it."""
    while not isinstance(answer := channel.answer(), Said):
        pass
    if answer.say == "refused":
        raise answer.refusal()
    if answer.say not in expected:
        raise CodecError(f"{expected[0]!r} must come now, not {answer.say!r:.40}")
    return answer


class Arrival(NamedTuple):
    """A stream that is whole: its name, its bytes (uint8), and what it took at this end."""

    name: Name
    memory: Tensor
    counters: Counters

    def tensors(self) -> tuple[wire.Tensors, dict[str, str]]:
        """The named tensors in it, as views of ``memory``, and what they say; raises ``CodecError`` if it is something else."""
        return wire.read(self.memory)


class Inbox:
    """The receiving side of one connection, and what it keeps from stream to stream: its pool of slots, its UCX endpoint.

    ``pool``: bytes that slots may take at most. ``workers`` check chunks while the next ones arrive.
    """

    def __init__(
        self, channel: Channel, desk: Desk, blocks: Blocks | None, pool: int, workers: Executor, use_ucx: bool = False
    ) -> None:
        self._channel, self._desk, self._blocks, self._pool, self._workers = channel, desk, blocks, pool, workers
        self._slots: Slots | None = None
        self._ucx = ucx.Receiver() if use_ucx else None

    def receive(self, message: Said) -> Arrival | None:
        """Receive the stream that ``message`` opens, until it is whole; None if it was whole before.

        Raises ``TransportError`` if it is refused, ``OSError`` or ``CodecError`` where the connection is of no use any more.
        """
        channel = self._channel
        try:
            plan, window = opening(message)
            incoming = self._desk.open(plan)
        except (TransportError, CodecError) as error:
            channel.send(control(message.name, "refused", reason=str(error)))
            raise TransportError(str(error)) from None
        if isinstance(incoming, str):
            self._again(plan, incoming)
            return None
        with incoming.owned(channel):
            receiver = incoming.receiver
            channel.send(control(plan.name, "go", have=receiver.arrived.pack(), **self._offers(message, plan, window)))
            while self._chunks(incoming) != receiver.digest:
                receiver.void()
                channel.send(control(plan.name, "void"))
            self._desk.finish(incoming)
            with suppress(OSError):  # a sender that does not hear it asks again
                channel.send(control(plan.name, "taken"))
        return Arrival(plan.name, incoming.memory, receiver.counters)

    def close(self) -> None:
        """The connection is gone."""
        if self._slots:
            self._slots.close()
        if self._ucx:
            self._ucx.close()

    def _again(self, plan: Plan, digest: str) -> None:
        """A sender that did not hear that its stream is whole."""
        self._channel.send(control(plan.name, "go", have=Arrived(plan.count, plan.count).pack()))
        done = self._channel.control()
        if done.say != "done" or done.get("digest", str) != digest:
            self._desk.forget(plan.name)
            raise CodecError(f"{plan.name} was received, and is not what is sent now")
        self._channel.send(control(plan.name, "taken"))

    def _offers(self, message: Said, plan: Plan, window: int) -> dict[str, object]:
        """The ways that payloads may come, of those that the sender can use."""
        ways, found = message.get("ways", list), dict[str, object]()
        if self._ucx and "ucx" in ways:
            found["ucx"] = self._ucx.offer
        if self._blocks and self._channel.local and "shared" in ways and window * plan.chunk <= self._pool and plan.count:
            if self._slots and (self._slots.window < window or self._slots.chunk < plan.chunk):
                self._slots.close()
                self._slots = None
            try:
                self._slots = self._slots or Slots(self._blocks, window, plan.chunk)
                found["shared"] = self._slots.offer
            except TransportError as error:
                log.warning("%s: %s", plan.name, error)
        return found

    def _chunks(self, incoming: Incoming) -> str:
        """Take chunks until the sender says that it is done, with the digest that is returned; those that were on their way are
        settled in any case."""
        channel, plan, receiver = self._channel, incoming.plan, incoming.receiver
        checks: deque[tuple[Frame, Future[bytes | None]]] = deque()

        def settle() -> bytes:
            frame, check = checks.popleft()
            return receiver.settle(frame, check.result()).pack()

        try:
            while True:
                while checks and (len(checks) >= WIDEST or checks[0][1].done() or not channel.ready()):
                    channel.send(settle())
                frame = channel.frame(forever=True)
                if frame.flags == CONTROL:
                    break
                place = receiver.place(frame)
                target = memoryview(bytearray(frame.length)) if place is None else place
                check = partial(_check, plan, frame, target, self._fetch(frame, target))
                if place is not None and frame.length >= SMALL:
                    checks.append((frame, self._workers.submit(check)))
                    continue
                while checks:
                    channel.send(settle())
                ack = receiver.ack() if place is None else receiver.settle(frame, check())
                channel.send(ack.pack())
            while checks:
                channel.send(settle())
        finally:
            while checks:
                with suppress(OSError):
                    settle()
            receiver.cut()
        done = channel.control(frame)
        if done.say != "done" or done.name != plan.name:
            raise CodecError(f"{plan.name} is being received; {done.say!r:.40} of {done.name} must not come now")
        if not receiver.arrived.all:
            raise CodecError(f"{plan.name} is done after {len(receiver.arrived)} of {plan.count} chunks")
        return done.get("digest", str)

    def _fetch(self, frame: Frame, target: memoryview) -> Callable[[], None]:
        """See to it that the payload gets into ``target``; what is left to do in another thread."""
        if frame.flags == SHARED:
            if self._slots is None:
                raise CodecError("a chunk in shared memory, of which there is none")
            return partial(copy, target, self._slots.slot(frame))
        if frame.flags == UCX:
            if self._ucx is None:
                raise CodecError("a chunk by UCX, which is not used here")
            return self._ucx.fetch(frame, target, self._channel.patience)
        self._channel.fill(target)
        return lambda: None


def _check(plan: Plan, frame: Frame, target: memoryview, arrives: Callable[[], None]) -> bytes | None:
    try:
        arrives()
    except ConnectionError as error:
        log.warning("%s: chunk %d did not arrive: %s", plan.name, frame.index, error)
        return None
    return verified(plan, frame, target)
