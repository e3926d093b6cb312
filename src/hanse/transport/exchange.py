"""One stream over one connection: the loops that drive ``Sender`` and ``Receiver``, and what both sides say before and after.

    sender    open {size, chunk, digest, window, ways}
    receiver  go {have, shared, ucx}           or    refused {reason}
    sender    chunks ...                             receiver  acknowledgements ...
    sender    done {digest}
    receiver  taken {}                         or    void {}: the digest is another, so nothing that has arrived counts

After ``void`` the sender sends everything again, once. Who dials makes no difference to this.
"""

from __future__ import annotations

import base64
import binascii
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, Protocol

from hanse.core.errors import CodecError, TransportError
from hanse.transport import ucx
from hanse.transport.blocks import Blocks
from hanse.transport.desk import Desk, Incoming, opening
from hanse.transport.frames import ACK, CONTROL, SHARED, UCX, WIDEST, Ack, Frame, Said, control
from hanse.transport.shared import Slots, Writer, copy
from hanse.transport.sources import Ahead, Source
from hanse.transport.stream import Arrived, Pace, Plan, Sender, verified
from hanse.transport.tcp import Channel, Inline

log = logging.getLogger(__name__)

WAYS = ("ucx", "shared", "inline")
"""How payloads may travel, the nearest to the hardware first."""
SMALL = 1 << 16
"""Chunks below are checked by the thread that receives them: handing them over would take longer."""


class Carrier(Protocol):
    """How payloads get to the other end."""

    def send(self, channel: Channel, frame: Frame, parts: Sequence[memoryview]) -> int:
        """Send a frame; the bytes that took on the connection."""

    def close(self) -> None:
        """Let go."""


class Outbox:
    """What the sending side of one connection keeps from stream to stream: the ways that were found to work."""

    def __init__(self, ways: Sequence[str]) -> None:
        self._ways = ways
        self._carriers: dict[str, Carrier] = {}

    def ways(self, channel: Channel) -> list[str]:
        """Those that may be tried on this connection."""
        return [way for way in self._ways if way != "shared" or channel.local]

    def carrier(self, go: Said, channel: Channel) -> Carrier:
        """The nearest way to the hardware of those that the receiver offers."""
        for way, made in (("ucx", self._ucx), ("shared", self._shared)):
            if way in self._ways and way in go.fields:
                try:
                    return made(Said(go.name, way, go.get(way, dict)), channel)
                except TransportError as error:
                    log.info("%s: not by %s: %s", go.name, way, error)
        return Inline()

    def close(self) -> None:
        """The connection is gone."""
        for carrier in self._carriers.values():
            carrier.close()

    def _ucx(self, offer: Said, channel: Channel) -> Carrier:
        if "ucx" not in self._carriers:
            self._carriers["ucx"] = ucx.Sender(channel.host, offer.get("port", int), offer.get("mark", str))
        return self._carriers["ucx"]

    def _shared(self, offer: Said, channel: Channel) -> Carrier:
        block = offer.get("block", str)
        known = self._carriers.get("shared")
        if not isinstance(known, Writer) or known.block != block:
            known = self._carriers["shared"] = Writer(block, offer.get("mark", str), offer.get("chunk", int))
        return known


class Outgoing:
    """A stream on its way, across as many connections as that takes."""

    def __init__(self, plan: Plan, source: Source, window: int, pace: Pace, tries: int) -> None:
        self.sender = Sender(plan, window, pace, tries)
        self._source = source
        self._ahead: Ahead | None = None
        self._voided = False

    def push(self, channel: Channel, outbox: Outbox) -> None:
        """Send what is missing, until the receiver has said that it has everything.

        Raises ``OSError`` or ``CodecError`` where another connection may help, ``TransportError`` where not.
        """
        sender, counters = self.sender, self.sender.counters
        before, wire = channel.sent + channel.received, counters.wire
        counters.connections += 1
        try:
            carrier = self._open(channel, outbox)
            while not self._taken(channel, carrier):
                if self._voided:
                    raise TransportError(f"{sender.plan.name}: twice the receiver had something else than was sent")
                log.warning("%s: the receiver has something else than was sent; all is sent again", sender.plan.name)
                self._voided = True
                self._resume(Arrived(sender.plan.count))
        finally:
            counters.control += channel.sent + channel.received - before - (counters.wire - wire)

    def close(self) -> None:
        """Stop making chunks."""
        if self._ahead:
            self._ahead.close()
            self._ahead = None

    def _open(self, channel: Channel, outbox: Outbox) -> Carrier:
        """Announce the stream and hear what has arrived; the way its payloads will take."""
        sender, plan = self.sender, self.sender.plan
        asked = time.monotonic()
        shape = {"size": plan.size, "chunk": plan.chunk, "digest": plan.digest, "window": sender.window}
        channel.send(control(plan.name, "open", **shape, ways=outbox.ways(channel)))
        go = _said(channel)
        if go.say == "refused":
            raise TransportError(f"refused: {go.get('reason', str)}")
        if go.say != "go":
            raise CodecError(f"'go' must come now, not {go.say!r:.40}")
        sender.pace.answered(time.monotonic() - asked)
        try:
            arrived = Arrived.unpack(base64.b64decode(go.get("have", str), validate=True), plan.count)
        except binascii.Error as error:
            raise CodecError(f"go: {error}") from None
        self._resume(arrived)
        return outbox.carrier(go, channel)

    def _resume(self, arrived: Arrived) -> None:
        """Go on from what has arrived; the source starts over where chunks are missing that are not held any more."""
        freed = self.sender.resume(arrived)
        if freed is None:
            self.close()
        if self._ahead:
            self._ahead.free(len(freed or ()))
        else:
            self._ahead = Ahead(self.sender.plan, self._source, self.sender.window, arrived.copy())

    def _taken(self, channel: Channel, carrier: Carrier) -> bool:
        """Send the chunks; whether the receiver then has what was sent."""
        sender = self.sender
        began, resent, there = time.monotonic(), sender.counters.resent, len(sender.arrived)
        self._run(channel, carrier)
        sent = (len(sender.arrived) - there) * min(sender.plan.chunk, sender.plan.size)
        sender.pace.delivered(sent, sender.counters.resent - resent, time.monotonic() - began)
        log.debug("%s: %d bytes; a window of %d; %s", sender.plan.name, sent, sender.window * sender.plan.chunk, sender.pace)
        channel.send(control(sender.plan.name, "done", digest=sender.digest))
        answer = _said(channel)
        if answer.say not in ("taken", "void"):
            raise CodecError(f"'taken' must come now, not {answer.say!r:.40}")
        return answer.say == "taken"

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
                sender.counters.wire += carrier.send(channel, *todo)
                sender.left(clock())
            elif sender.spent is None:
                until = sender.deadline
                channel.ready(None if until is None else until - clock(), ahead.wake)
            elif isinstance(carrier, Inline):
                raise ConnectionAbortedError(f"chunk {sender.spent} was lost {sender.tries} times")
            else:
                log.warning("%s: chunk %d was lost %d times; the rest goes by TCP", sender.plan.name, sender.spent, sender.tries)
                carrier = Inline()
                sender.forgive()


def _said(channel: Channel) -> Said:
    """The next control message; acknowledgements of what was sent twice may come before it."""
    while True:
        answer = channel.answer()
        if isinstance(answer, Said):
            return answer


class _Here(Executor):
    """Does at once what it is given."""

    def submit(self, work: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        done = Future[Any]()
        done.set_result(work(*given, **named))
        return done


_HERE = _Here()


def _check(plan: Plan, frame: Frame, target: memoryview, arrives: Callable[[], None] | None) -> bytes | None:
    if arrives:
        try:
            arrives()
        except ConnectionError as error:
            log.warning("%s: chunk %d did not arrive: %s", plan.name, frame.index, error)
            return None
    return verified(plan, frame, target)


def _checked(check: Future[bytes | None] | None) -> bool:
    return check is None or check.done()


class Inbox:
    """What the receiving side of one connection keeps from stream to stream: its pool of slots, its UCX endpoint.

    ``pool``: bytes that slots may take at most. ``workers`` check chunks while the next ones arrive.
    """

    def __init__(self, desk: Desk, blocks: Blocks | None, pool: int, workers: Executor, use_ucx: bool = False) -> None:
        self._desk, self._blocks, self._pool, self._workers = desk, blocks, pool, workers
        self._slots: Slots | None = None
        self._ucx = ucx.Receiver() if use_ucx else None

    def receive(self, channel: Channel, message: Said) -> Incoming | None:
        """Receive the stream that ``message`` opens, until it is whole; None if it was refused, or was whole before.

        Raises ``OSError`` or ``CodecError`` where the connection is of no use any more.
        """
        try:
            plan, window = opening(message)
            incoming = self._desk.open(plan)
        except (TransportError, CodecError) as error:
            log.warning("refused %s from %s: %s", message.name, channel.host, error)
            channel.send(control(message.name, "refused", reason=str(error)))
            return None
        if isinstance(incoming, str):
            self._again(channel, plan, incoming)
            return None
        with incoming.owned(channel):
            if incoming.finished:
                self._again(channel, plan, incoming.receiver.digest)
                return None
            channel.send(control(plan.name, "go", have=incoming.have(), **self._offers(channel, message, plan, window)))
            while True:
                done, arrived = self._chunks(channel, incoming), incoming.receiver.arrived
                if not arrived.all:
                    raise CodecError(f"{plan.name} is done after {len(arrived)} of {plan.count} chunks")
                if incoming.receiver.digest == done.get("digest", str):
                    break
                incoming.void()
                channel.send(control(plan.name, "void"))
            self._desk.finish(incoming)
            channel.send(control(plan.name, "taken"))
        return incoming

    def close(self) -> None:
        """The connection is gone."""
        if self._slots:
            self._slots.close()
        if self._ucx:
            self._ucx.close()

    def _again(self, channel: Channel, plan: Plan, digest: str) -> None:
        """A sender that did not hear that its stream is whole."""
        everything = Arrived.full(plan.count)
        channel.send(control(plan.name, "go", have=base64.b64encode(everything.pack()).decode()))
        done = channel.control(channel.frame())
        same = done.say == "done" and done.get("digest", str) == digest
        if not same:
            self._desk.forget(plan.name)
            raise CodecError(f"{plan.name} was received, and is not what is sent now")
        channel.send(control(plan.name, "taken"))

    def _offers(self, channel: Channel, message: Said, plan: Plan, window: int) -> dict[str, object]:
        """The ways that payloads may come, of those that the sender can use."""
        ways, found = message.get("ways", list), dict[str, object]()
        if self._ucx and "ucx" in ways:
            found["ucx"] = self._ucx.offer()
        if self._blocks and channel.local and "shared" in ways and 0 < window * plan.chunk <= self._pool and plan.count:
            if self._slots is None or not self._slots.fits(window, plan.chunk):
                if self._slots:
                    self._slots.close()
                    self._slots = None
                try:
                    self._slots = Slots(self._blocks, window, plan.chunk)
                except TransportError as error:
                    log.warning("%s: %s", plan.name, error)
                    return found
            found["shared"] = self._slots.offer()
        return found

    def _chunks(self, channel: Channel, incoming: Incoming) -> Said:
        """Take chunks until the sender says something else, which is returned; what was on its way is written down in any case."""
        plan, receiver = incoming.plan, incoming.receiver
        pending: deque[tuple[Frame, Future[bytes | None] | None]] = deque()  # None: it had arrived before

        def settle() -> Ack:
            frame, checked = pending.popleft()
            if checked is None:
                return receiver.ack()
            digest = checked.result()
            if digest is not None:
                incoming.add(frame.index, digest)
            return receiver.settle(frame, digest)

        def answer() -> None:
            channel.send(settle().pack())

        try:
            while True:
                while pending and (len(pending) >= WIDEST or _checked(pending[0][1]) or not channel.ready()):
                    answer()
                frame = channel.frame(forever=True)
                if frame.flags == CONTROL:
                    while pending:
                        answer()
                    message = channel.control(frame)
                    if message.say != "done" or message.name != plan.name:
                        raise CodecError(f"{plan.name} is being received; {message.say!r:.40} of {message.name} must not come now")
                    return message
                place = receiver.place(frame)
                target = memoryview(bytearray(frame.length)) if place is None else place
                arrives = self._fetch(channel, frame, target)
                workers = self._workers if frame.length >= SMALL else _HERE
                pending.append((frame, None if place is None else workers.submit(_check, plan, frame, target, arrives)))
        finally:
            while pending:
                with suppress(OSError):
                    settle()
            receiver.cut()

    def _fetch(self, channel: Channel, frame: Frame, target: memoryview) -> Callable[[], None] | None:
        """See to it that the payload gets into ``target``; what is left to do in another thread."""
        if frame.flags == SHARED:
            if self._slots is None:
                raise CodecError("a chunk in shared memory, of which there is none")
            slot = self._slots.slot(frame)
            return lambda: copy(target, slot)
        if frame.flags == UCX:
            if self._ucx is None:
                raise CodecError("a chunk by UCX, which is not used here")
            return self._ucx.fetch(frame, target, channel.patience)
        channel.fill(target)
        return None
