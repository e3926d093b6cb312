"""Both ends of a stream against each other, through channels that do everything to frames that channels do."""

import copy
import hashlib
import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.core.errors import CodecError, ConfigError
from hanse.transport.frames import WIDEST, Ack, Frame, Name
from hanse.transport.stream import Arrived, Pace, Plan, Receiver, Sender, cut, prepared, verified

NAME = Name(1, 2, 3)


def views(data: bytes, *ends: int) -> list[memoryview]:
    return [memoryview(data)[a:b] for a, b in itertools.pairwise((0, *sorted(ends), len(data)))]


def chunks(plan: Plan, data: bytes):
    return [prepared(plan, i, parts) for i, parts in enumerate(cut(views(data), plan.chunk))]


class Stream:
    """A sender and a receiver of ``data``, a clock, and what is on its way between them."""

    def __init__(self, data: bytes, chunk: int, window: int, digest: str = "sha256", tries: int = 10**9) -> None:
        self.plan = Plan(NAME, len(data), chunk, digest).check()
        self.data, self.now, self.made = data, 0.0, 0
        self.chunks = chunks(self.plan, data)
        self.memory = bytearray(len(data))
        self.sender = Sender(self.plan, window, Pace(), tries)
        self.receiver = Receiver(self.plan, memoryview(self.memory))
        self.up: list[tuple[Frame, bytes]] = []
        self.down: list[Ack] = []

    def fill(self) -> None:
        while len(self.sender.held) < self.sender.window and self.made < self.plan.count:
            self.sender.hold(self.chunks[self.made])
            self.made += 1

    def send(self) -> bool:
        todo = self.sender.next(self.now)
        if todo:
            self.up.append((todo[0], b"".join(todo[1])))
        return todo is not None

    def arrive(self, frame: Frame, payload: bytes) -> None:
        place = self.receiver.place(frame)
        if place is None:
            self.down.append(self.receiver.ack())
        else:
            place[:] = payload
            self.down.append(self.receiver.settle(frame, verified(self.plan, frame, place)))

    def answer(self, ack: Ack) -> None:
        self.sender.acknowledged(ack, self.now)

    def wait(self) -> None:
        assert self.sender.deadline is not None
        self.now = self.sender.deadline

    def run(self, until: int | None = None) -> None:
        """A perfect channel, until so many chunks have been acknowledged."""
        while not self.sender.over and (until is None or len(self.sender.arrived) < until):
            self.fill()
            while self.send():
                pass
            self.arrive(*self.up.pop(0))
            self.answer(self.down.pop(0))


FATES = ["through"] * 6 + ["lost", "twice", "damaged", "late"]


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(1, 250), st.integers(1, 12), st.sampled_from(["sha256", "crc32"]), st.randoms())
def test_everything_arrives_through_any_channel(data, chunk, window, digest, random):
    stream = Stream(data, chunk, window, digest)
    sender = stream.sender
    for _ in range(20_000):
        stream.fill()
        sent = stream.send()
        assert len(sender._flying) <= len(sender.held) <= window
        for line, deliver in ((stream.up, lambda f: stream.arrive(*f)), (stream.down, stream.answer)):
            if line and random.random() < 0.7:
                fate = random.choice(FATES)
                one = line.pop(random.randrange(len(line)) if fate == "late" else 0)
                if fate == "damaged" and line is stream.up:
                    harmed = bytearray(one[1])
                    harmed[random.randrange(len(harmed))] ^= 1 << random.randrange(8)
                    one = (one[0], bytes(harmed))
                if fate != "lost":
                    deliver(one)
                if fate == "twice":
                    deliver(one)
        if sender.over:
            break
        if not sent and not stream.up and not stream.down and sender.deadline is not None:
            stream.wait()
    assert sender.over and stream.memory == data and stream.receiver.arrived.all
    assert sender.digest == stream.receiver.digest
    assert sender.counters.peak <= window
    assert sender.counters.chunks == stream.plan.count + sender.counters.resent


@given(st.binary(min_size=1, max_size=100), st.integers(1, 120), st.integers(1, 8))
def test_nothing_is_sent_twice_where_nothing_is_lost(data, chunk, window):
    stream = Stream(data, chunk, window)
    stream.run()
    assert stream.sender.counters.chunks == stream.receiver.counters.acks == stream.plan.count
    assert stream.sender.counters.resent == 0 and stream.memory == data


@given(st.binary(min_size=1, max_size=100), st.integers(1, 10), st.integers(1, 8), st.data())
def test_after_a_cut_only_what_is_missing_is_sent(data, chunk, window, draw):
    stream = Stream(data, chunk, window)
    got = draw.draw(st.integers(0, stream.plan.count))
    stream.run(until=got)
    while stream.send():
        pass  # and these are in flight when it is cut
    before = stream.sender.counters.chunks
    stream.up.clear()
    stream.down.clear()
    stream.sender.resume(Arrived.unpack(stream.receiver.arrived.pack(), stream.plan.count))
    stream.run()
    assert stream.sender.counters.chunks - before == stream.plan.count - got
    assert stream.memory == data


def test_a_receiver_that_lost_what_it_had_gets_everything_anew():
    stream = Stream(bytes(range(50)), 5, 3)
    stream.run(until=6)
    assert stream.sender.resume(Arrived(stream.plan.count)) is None and not stream.sender.held
    stream.receiver.void()
    stream.up.clear()
    stream.down.clear()
    stream.made = 0
    stream.run()
    assert stream.memory == stream.data and stream.receiver.digest == stream.sender.digest


def test_acknowledgements_that_a_cut_swallowed_are_made_good():
    stream = Stream(bytes(range(50)), 5, 4)
    stream.fill()
    while stream.send():
        pass
    stream.arrive(*stream.up[0])
    stream.arrive(*stream.up[1])
    assert stream.sender.resume(copy.copy(stream.receiver.arrived)) == 2
    assert stream.sender.next(0.0)[0].index == 2


def test_a_chunk_is_lost_when_a_later_one_arrives():
    stream = Stream(bytes(50), 5, 4)
    stream.fill()
    while stream.send():
        pass
    stream.up.pop(1)
    stream.arrive(*stream.up.pop(0))
    stream.answer(stream.down.pop())
    assert not stream.send() and stream.sender.deadline is not None  # nothing is known of it yet
    stream.arrive(*stream.up.pop(0))
    stream.answer(stream.down.pop())
    assert stream.send() and stream.up[-1][0].index == 1


def test_a_damaged_chunk_is_sent_again_at_once_and_no_other():
    stream = Stream(bytes(50), 5, 1)
    stream.fill()
    stream.send()
    frame, payload = stream.up.pop()
    stream.arrive(frame, b"x" * len(payload))
    assert stream.down[0].damaged
    stream.answer(stream.down.pop())
    assert stream.send() and stream.up[-1][0] == frame
    assert stream.sender.counters.damaged == stream.sender.counters.resent == 1


def test_the_last_chunk_is_sent_again_when_nothing_comes_back():
    stream = Stream(bytes(20), 5, 4)
    stream.sender.pace = Pace(rtt=0.1, bandwidth=10.0, least=0.0)
    stream.fill()
    while stream.send():
        pass
    for _ in range(3):
        stream.arrive(*stream.up.pop(0))
        stream.now += 1.0
        stream.answer(stream.down.pop())
    assert stream.sender.deadline == pytest.approx(3.0 + 4 * 0.1 + 5 / 10)
    assert not stream.send()
    stream.wait()
    assert stream.send() and stream.up[-1][0].index == 3
    assert stream.sender.deadline == pytest.approx(stream.now + 2 * 0.9)  # the next wait is twice as long


def test_a_chunk_that_fails_again_and_again_is_spent():
    stream = Stream(bytes(20), 5, 1, tries=5)
    stream.fill()
    for _ in range(5):
        while stream.send():
            pass
        stream.wait()
    assert not stream.send() and stream.sender.spent == 0
    stream.sender.forgive()
    assert stream.send()


def test_chunks_in_flight_fit_into_one_acknowledgement():
    stream = Stream(bytes(300), 1, WIDEST)
    stream.sender.resume(Arrived.unpack(Arrived(300, 300).pack(), 300))
    have = Arrived(300)
    for index in itertools.chain(range(3), range(4, 80)):
        have.add(index)
    fresh = Sender(stream.plan, 4, Pace())
    fresh.resume(have)
    fresh.hold(stream.chunks[3])
    fresh.hold(stream.chunks[80])
    assert fresh.next(0.0)[0].index == 3
    assert fresh.next(0.0) is None  # chunk 80 is more than 64 beyond the first that is missing


@pytest.mark.parametrize("ack", [Ack(3, 1, 0), Ack(3, 0, 2), Ack(3, 11, 0), Ack(3, 0, 1 << 20)])
def test_chunks_that_were_not_sent_cannot_be_acknowledged(ack):
    stream = Stream(bytes(50), 5, 4)
    stream.fill()
    with pytest.raises(CodecError, match="acknowledged"):
        stream.answer(ack)


def test_acknowledgements_of_other_streams_say_nothing():
    stream = Stream(bytes(50), 5, 4)
    stream.fill()
    stream.send()
    stream.answer(Ack(4, 1, 0))
    assert len(stream.sender.arrived) == 0


@pytest.mark.parametrize(
    "change",
    [{"name": Name(9, 2, 3)}, {"name": Name(1, 9, 3)}, {"name": Name(1, 2, 9)}, {"count": 11}, {"length": 4}, {"index": 9}],
)
def test_foreign_chunks_are_refused(change):
    stream = Stream(bytes(48), 5, 4)
    stream.fill()
    stream.send()
    with pytest.raises(CodecError):
        stream.receiver.place(replace(stream.up[0][0], **change))


def test_a_chunk_in_the_place_of_another_is_damaged():
    stream = Stream(bytes(50), 5, 4)
    stream.fill()
    stream.send()
    frame, payload = stream.up[0]
    assert verified(stream.plan, frame, memoryview(payload)) == stream.chunks[0].digest
    assert verified(stream.plan, replace(frame, index=1), memoryview(payload)) is None


def test_a_chunk_that_comes_again_while_it_is_checked_does_not_touch_it():
    stream = Stream(b"abcde", 5, 1)
    stream.fill()
    stream.send()
    frame, _ = stream.up[0]
    assert stream.receiver.place(frame) is not None
    assert stream.receiver.place(frame) is None
    stream.receiver.cut()  # it never came to an end
    assert stream.receiver.place(frame) is not None


def test_the_digest_is_that_of_the_chunks():
    data = bytes(range(100))
    stream = Stream(data, 30, 2)
    stream.run()
    parts = [data[at : at + 30] for at in range(0, 100, 30)]
    assert stream.sender.digest == hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=5), st.integers(1, 70))
def test_cutting_changes_no_byte_and_copies_none(data, ends, chunk):
    found = list(cut(views(data, *(min(e, len(data)) for e in ends)), chunk))
    assert b"".join(b"".join(parts) for parts in found) == data
    assert all(sum(map(len, parts)) == chunk for parts in found[:-1])
    assert all(part.obj is data for parts in found for part in parts)


@given(
    st.integers(0, 200).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, max(0, n - 1)), unique=True, max_size=n)))
)
def test_what_has_arrived_is_a_set(case):
    count, order = case
    found, expected = Arrived(count), set()
    for index in order:
        found.add(index)
        expected.add(index)
        assert len(found) == len(expected) and found.all == (len(expected) == count)
        assert found.base == next(i for i in itertools.count() if i not in expected)
    assert {i for i in range(count) if i in found} == expected
    again = Arrived.unpack(found.pack(), count)
    assert (again.base, again.ahead, len(again)) == (found.base, found.ahead, len(found))
    told = {i for i in expected if i < found.base + WIDEST}
    assert set(Arrived(count).news(found.ack(3))) == told and found.news(found.ack(3)) == []


@given(st.text(max_size=30) | st.integers(-(2**100), 2**100).map(lambda n: f"{n:x}"), st.integers(0, 100))
def test_other_texts_do_not_tell_what_has_arrived(data, count):
    try:
        found = Arrived.unpack(data, count)
    except CodecError:
        return
    assert len(found) <= count


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (Plan(Name(2**64, 0, 0), 1, 1), "job below"),
        (Plan(Name(0, -1, 0), 1, 1), "round"),
        (Plan(NAME, 1, 0), "chunks are not empty"),
        (Plan(NAME, -1, 1), "neither is negative"),
        (Plan(NAME, 1 << 21, 1), "at most"),
        (Plan(NAME, 1 << 31, 1 << 31), "at most"),
        (Plan(NAME, 1, 1, "md5"), "digest: 'md5' is unknown; allowed: sha256, crc32"),
    ],
)
def test_streams_that_cannot_be(plan, match):
    with pytest.raises(ConfigError, match=match):
        plan.check()


def test_a_timeout_follows_what_was_measured():
    pace = Pace(patience=7.0, least=0.0)
    assert str(pace) == "nothing measured yet"
    assert pace.timeout(10**6) == 7.0
    pace.answered(0.02)
    pace.delivered(10**6, 0, 0.1)
    assert str(pace) == "10.0 MB/s, RTT 20.0 ms: 200,000 bytes fill the link"
    assert pace.timeout(5 * 10**5) == pytest.approx(4 * 0.02 + 0.05)
    pace.answered(0.06)
    assert pace.rtt == pytest.approx(0.03)
