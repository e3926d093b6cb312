"""Both ends of a stream as state machines that know neither sockets nor clocks: what to send next, what an acknowledgement means,
what is lost, what is whole.

A ``Sender`` holds at most W chunks that are prepared and not acknowledged; everything else is with the receiver or not made yet.
Whoever drives it gives it chunks (``hold``), asks it for frames (``next``), tells it what comes back (``acknowledged``) and what
time it is. A ``Receiver`` says where in the stream's memory a payload goes (``place``) and what to answer to it (``settle``).

Chunks and acknowledgements travel in order, so a chunk is lost when its answer says so or when one that was sent after it has
arrived; the last ones in flight are lost when nothing has come back for a while (the timer of RFC 6298, section 5, with timeout =
4 RTT + bytes in flight / B). A channel that reorders makes it send too much, never something wrong.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

from hanse.core.errors import CodecError, ConfigError
from hanse.transport.frames import INLINE, LONGEST_CHUNK, MAGIC, MOST_CHUNKS, WIDEST, Ack, Frame, Name, checksum

DIGESTS = ("sha256", "crc32")
_MOST_DOUBLINGS = 5
_WORD = (1 << WIDEST) - 1


@dataclass(frozen=True)
class Plan:
    """A stream of ``size`` bytes in chunks of ``chunk``, the last one shorter.

    ``digest`` says what of each chunk goes into the digest of the stream, which is the SHA-256 of that of all chunks in order:
    their SHA-256, or with "crc32" their checksums, which costs a fifth and finds damage but no forgery.
    """

    name: Name
    size: int
    chunk: int
    digest: str = "sha256"

    @property
    def count(self) -> int:
        """Chunks."""
        return -(-self.size // self.chunk)

    def span(self, index: int) -> slice:
        """Where a chunk lies in the stream."""
        return slice(index * self.chunk, min((index + 1) * self.chunk, self.size))

    def whole(self, digests: MutableMapping[int, bytes]) -> str:
        """The digest of the stream, of those of its chunks."""
        return hashlib.sha256(b"".join(digests[i] for i in range(self.count))).hexdigest()

    def check(self) -> Plan:
        """This plan; raises ``ConfigError`` if there can be no such stream."""
        if not (0 <= self.name.job < 1 << 64 and 0 <= self.name.round < 1 << 32 and 0 <= self.name.number < 1 << 32):
            raise ConfigError(f"stream: {tuple(self.name)} must be a job below 2**64, a round and a number below 2**32")
        if self.name.number == MAGIC:
            raise ConfigError(f"stream: the number {MAGIC} is taken")
        if self.digest not in DIGESTS:
            raise ConfigError(f"digest: {self.digest!r:.40} is unknown; allowed: {', '.join(DIGESTS)}")
        if self.size < 0 or self.chunk < 1:
            raise ConfigError(f"stream: {self.size} bytes in chunks of {self.chunk}; neither is negative, and chunks are not empty")
        if min(self.chunk, self.size) > LONGEST_CHUNK or self.count > MOST_CHUNKS:
            raise ConfigError(
                f"chunk: {self.chunk:,} bytes for a stream of {self.size:,}; a chunk has at most {LONGEST_CHUNK:,} bytes and a"
                f" stream at most {MOST_CHUNKS:,} chunks"
            )
        return self


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk that is ready to travel; without ``parts`` one that the receiver has already."""

    index: int
    parts: Sequence[memoryview]
    crc: int
    digest: bytes


def cut(pieces: Iterable[memoryview], chunk: int) -> Iterator[list[memoryview]]:
    """The pieces of a stream as chunks, without a copy: a chunk is a list of parts of pieces."""
    parts: list[memoryview] = []
    room = chunk
    for piece in pieces:
        if piece.nbytes == 0:
            continue
        view = piece.cast("B")
        while len(view):
            parts.append(view[:room])
            room -= len(parts[-1])
            view = view[len(parts[-1]) :]
            if not room:
                yield parts
                parts, room = [], chunk
    if parts:
        yield parts


def prepared(plan: Plan, index: int, parts: Sequence[memoryview]) -> Chunk:
    """Checksum and digest of a chunk."""
    crc = checksum(plan.name, index, plan.count, parts)
    if plan.digest == "crc32":
        return Chunk(index, parts, crc, crc.to_bytes(4, "little"))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return Chunk(index, parts, crc, digest.digest())


def verified(plan: Plan, frame: Frame, payload: memoryview) -> bytes | None:
    """What the chunk adds to the digest of the stream; None if it is damaged."""
    chunk = prepared(plan, frame.index, [payload])
    return chunk.digest if chunk.crc == frame.crc else None


class Arrived:
    """A set of chunks: all below ``base``, and ``base + k`` for every bit k of ``ahead``."""

    def __init__(self, count: int, base: int = 0, ahead: int = 0) -> None:
        self.count, self.base, self.ahead = count, base, ahead

    def __len__(self) -> int:
        return self.base + self.ahead.bit_count()

    def __contains__(self, index: int) -> bool:
        return index < self.base or bool(self.ahead >> (index - self.base) & 1)

    @property
    def all(self) -> bool:
        """Whether nothing is missing."""
        return self.base == self.count

    @property
    def bits(self) -> int:
        """A bit a chunk, the first the lowest."""
        return self.ahead << self.base | (1 << self.base) - 1

    def add(self, index: int) -> None:
        """Add one that is not in it."""
        self.ahead |= 1 << (index - self.base)
        gone = _ones(self.ahead)
        self.base += gone
        self.ahead >>= gone

    def ack(self, number: int) -> Ack:
        """What of it fits into an acknowledgement."""
        return Ack(number, self.base, self.ahead & _WORD)

    def news(self, ack: Ack) -> list[int]:
        """The chunks of ``ack`` that are not in it. Raises ``CodecError`` if there are no such chunks."""
        end = ack.base + ack.bitmap.bit_length()
        if end > self.count:
            raise CodecError(f"chunk {max(ack.base, end - 1)} of {self.count} is acknowledged")
        above = [i for i in range(ack.base + 1, end) if ack.bitmap >> (i - ack.base) & 1]
        return [i for i in (*range(self.base, ack.base), *above) if i not in self]

    def pack(self) -> str:
        """``bits``, hexadecimal."""
        return f"{self.bits:x}"

    @classmethod
    def unpack(cls, text: str, count: int) -> Arrived:
        """Raises ``CodecError`` unless ``text`` tells of at most ``count`` chunks."""
        try:
            bits = int(text, 16)
        except ValueError:
            raise CodecError(f"what has arrived cannot be read: {text!r:.40}") from None
        if bits < 0 or bits.bit_length() > count:
            raise CodecError(f"what has arrived is {text!r:.40}; there are {count} chunks")
        base = _ones(bits)
        return cls(count, base, bits >> base)


def _ones(bits: int) -> int:
    """How many, from the lowest bit up."""
    return (~bits & (bits + 1)).bit_length() - 1


@dataclass
class Pace:
    """What is known of the way to a peer: moving averages in seconds, bytes per second and losses per byte.

    Kept from stream to stream. Before anything has been measured a timeout is ``patience``; it is never below ``least``.
    """

    rtt: float | None = None
    bandwidth: float | None = None
    loss: float = 0.0
    patience: float = 3.0
    least: float = 0.2
    _WEIGHT = 0.25

    def __str__(self) -> str:
        if self.rtt is None or self.bandwidth is None:
            return "nothing measured yet"
        product = self.rtt * self.bandwidth
        return f"{self.bandwidth / 1e6:.1f} MB/s, RTT {1000 * self.rtt:.1f} ms: {product:,.0f} bytes fill the link"

    def timeout(self, flying: int) -> float:
        """Seconds without an answer after which ``flying`` bytes count as lost."""
        if self.rtt is None or self.bandwidth is None:
            return self.patience
        return max(self.least, 4 * self.rtt + flying / self.bandwidth)

    def answered(self, seconds: float) -> None:
        """A message without a payload was answered after this time."""
        self.rtt = self._mean(self.rtt, seconds)

    def delivered(self, size: int, lost: int, seconds: float) -> None:
        """``size`` bytes have arrived in this time, and ``lost`` chunks had to be sent again."""
        if size and seconds > 0:
            self.bandwidth = self._mean(self.bandwidth, size / seconds)
            self.loss = self._mean(self.loss, lost / size)

    def _mean(self, old: float | None, new: float) -> float:
        return new if old is None else old + self._WEIGHT * (new - old)


@dataclass
class Counters:
    """What a stream took: ``chunks`` were sent, ``resent`` of them not for the first time; ``acks`` came back, for ``damaged`` too.

    ``wire`` bytes of these went over the connection, ``control`` of messages beside them; ``peak`` chunks were in flight at most.
    """

    chunks: int = 0
    resent: int = 0
    damaged: int = 0
    acks: int = 0
    wire: int = 0
    control: int = 0
    peak: int = 0
    connections: int = 0


@dataclass
class _Held:
    chunk: Chunk
    slot: int
    sent: bool = False
    failed: int = 0


class Sender:
    """The sending end. ``tries``: losses of one chunk after which it is ``spent``, and something else must be done."""

    def __init__(self, plan: Plan, window: int, pace: Pace, tries: int = 5) -> None:
        self.plan, self.window, self.pace, self.tries = plan, window, pace, tries
        self.arrived = Arrived(plan.count)
        self.digests: dict[int, bytes] = {}
        self.counters = Counters()
        self.held: dict[int, _Held] = {}
        self.spent: int | None = None
        """A chunk that was lost ``tries`` times; None again after ``forgive``."""
        self._slots = list(range(window))
        self._unsent: list[int] = []  # a heap
        self._flying: list[int] = []  # in the order in which they were sent last
        self._since = 0.0
        self._doublings = 0

    @property
    def over(self) -> bool:
        """Everything has arrived, and the digest is known."""
        return self.arrived.all and len(self.digests) == self.plan.count

    @property
    def digest(self) -> str:
        """That of the whole stream, once it is ``over``."""
        return self.plan.whole(self.digests)

    def resume(self, arrived: Arrived) -> int | None:
        """A connection was made whose other end has this. How many chunks need not be held any more, or None where it lacks
        some that are not held: then the stream must be made anew, and nothing is held."""
        lacking = self.arrived.bits & ~arrived.bits
        self.arrived = arrived
        self._doublings = 0
        self._flying.clear()
        self.forgive()
        done = [i for i in self.held if lacking or i in arrived]
        for index in done:
            self._slots.append(self.held.pop(index).slot)
        self._unsent = sorted(self.held)
        return None if lacking else len(done)

    def hold(self, chunk: Chunk) -> bool:
        """Take a chunk over; False if there was no need to, because the receiver has it."""
        self.digests[chunk.index] = chunk.digest
        if chunk.index in self.arrived:
            return False
        assert len(self.held) < self.window, "more chunks than credits"
        self.held[chunk.index] = _Held(chunk, self._slots.pop())
        heapq.heappush(self._unsent, chunk.index)
        return True

    def next(self, now: float) -> tuple[Frame, Sequence[memoryview]] | None:
        """The frame to be sent now, with its payload; None if there is none, until ``deadline`` or news from elsewhere."""
        if self.deadline is not None and now >= self.deadline:
            self._doublings += 1
            self._since = now
            self._lose(self._flying[0])
        if not self._unsent or self._unsent[0] >= self.arrived.base + WIDEST or self.spent is not None:
            return None
        index = heapq.heappop(self._unsent)
        held, span = self.held[index], self.plan.span(index)
        self._since = now
        self._flying.append(index)
        assert len(self._flying) <= self.window, "more chunks in flight than credits"
        self.counters.peak = max(self.counters.peak, len(self._flying))
        self.counters.chunks += 1
        self.counters.resent += held.sent
        held.sent = True
        frame = Frame(INLINE, held.slot, self.plan.name, index, self.plan.count, span.stop - span.start, held.chunk.crc)
        return frame, held.chunk.parts

    def left(self, now: float) -> None:
        """The last frame is on its way, after a wait for room perhaps, which is not counted as one for an answer."""
        self._since = now

    @property
    def deadline(self) -> float | None:
        """When ``next`` is to be asked again though nothing has come back; None if only something else can change anything."""
        if not self._flying:
            return None
        flying = len(self._flying) * min(self.plan.chunk, self.plan.size)
        return self._since + self.pace.timeout(flying) * (1 << min(self._doublings, _MOST_DOUBLINGS))

    def acknowledged(self, ack: Ack, now: float) -> int:
        """How many chunks need not be held any more. Raises ``CodecError`` if it names chunks that were not sent."""
        self.counters.acks += 1
        self.counters.damaged += ack.damaged
        if ack.number != self.plan.name.number:
            return 0  # of a stream before this one
        news = self.arrived.news(ack)
        for index in news:
            held = self.held.pop(index, None)
            if held is None or not held.sent:
                raise CodecError(f"{self.plan.name}: chunk {index} is acknowledged and was not sent")
            self.arrived.add(index)
            self._slots.append(held.slot)
        if news:
            self._since, self._doublings = now, 0
            self._unsent = sorted(set(self._unsent).difference(news))
            last = max((place for place, index in enumerate(self._flying) if index in news), default=0)
            overtaken = [index for index in self._flying[:last] if index not in news]
            self._flying = [index for index in self._flying if index not in news]
            for index in overtaken:
                self._lose(index)
        if ack.damaged and self._flying:
            self._since = now
            self._lose(self._flying[0])  # the oldest: answers come in the order of the chunks
        return len(news)

    def forgive(self) -> None:
        """What failed so far does not count any more: chunks travel another way from now on."""
        self.spent = None
        for held in self.held.values():
            held.failed = 0

    def _lose(self, index: int) -> None:
        self._flying.remove(index)
        held = self.held[index]
        held.failed += 1
        if held.failed >= self.tries:
            self.spent = index
        heapq.heappush(self._unsent, index)


class Receiver:
    """The receiving end, over the ``memory`` of the whole stream.

    ``digests``: those of chunks that lie there already; what a chunk adds is put there before it is acknowledged.
    """

    def __init__(self, plan: Plan, memory: memoryview, digests: MutableMapping[int, bytes] | None = None) -> None:
        self.plan, self.memory = plan, memory
        self.digests = {} if digests is None else digests
        self.arrived = Arrived(plan.count)
        self.counters = Counters()
        self._landing: set[int] = set()
        for index in self.digests:
            self.arrived.add(index)

    def place(self, frame: Frame) -> memoryview | None:
        """Where a payload goes, ``settle`` to follow; None if it is not needed. Raises ``CodecError`` on a foreign frame."""
        plan, index = self.plan, frame.index
        if frame.name != plan.name:
            raise CodecError(f"a chunk of job {frame.name.job}, {frame.name}; this is job {plan.name.job}, {plan.name}")
        span = plan.span(index)
        if frame.count != plan.count or frame.length != span.stop - span.start:
            raise CodecError(
                f"{plan.name}: chunk {index} of {frame.count} with {frame.length} bytes; there are {plan.count}, of {plan.chunk}"
            )
        self.counters.chunks += 1
        if index in self.arrived or index in self._landing:
            self.counters.resent += 1
            return None
        self._landing.add(index)
        return self.memory[span]

    def settle(self, frame: Frame, digest: bytes | None) -> Ack:
        """The answer to a chunk that was checked; ``digest`` as ``verified`` gives it."""
        self._landing.discard(frame.index)
        if digest is None:
            self.counters.damaged += 1
            ack = self.ack()
            return ack._replace(bitmap=ack.bitmap | 1)
        self.digests[frame.index] = digest
        self.arrived.add(frame.index)
        return self.ack()

    def ack(self) -> Ack:
        """What it has."""
        self.counters.acks += 1
        return self.arrived.ack(self.plan.name.number)

    def cut(self) -> None:
        """No chunk is on its way any more; those that were placed and not settled never will be."""
        self._landing.clear()

    @property
    def digest(self) -> str:
        """That of the whole stream, once everything has arrived."""
        return self.plan.whole(self.digests)

    def void(self) -> None:
        """Nothing that has arrived counts."""
        self.arrived = Arrived(self.plan.count)
        self.digests.clear()
        self._landing.clear()
