import socket
from dataclasses import replace

import pytest

from hanse.core.errors import CodecError, TransportError
from hanse.transport import shared
from hanse.transport.blocks import Blocks
from hanse.transport.exchange import Outbox, Outgoing
from hanse.transport.frames import INLINE, SHARED, Frame, Name, Said
from hanse.transport.handshake import enter
from hanse.transport.peers import Link, Listener
from hanse.transport.shared import Slots, Writer
from hanse.transport.sources import content
from hanse.transport.stream import Pace, Plan
from hanse.transport.tcp import Channel, dial
from tests.transport.processes import TOKEN

FRAME = Frame(INLINE, 2, Name(1, 2, 3), 0, 1, 5, 0)


@pytest.fixture
def blocks():
    made = Blocks()
    yield made
    made.close()


def writer(slots, **change):
    return Writer(Said(Name(1, 2, 3), "shared", {**slots.offer, **change}))


def test_what_is_written_lies_in_the_slot_and_only_the_header_travels(blocks):
    slots = Slots(blocks, 4, 100)
    here, there = (Channel(end) for end in socket.socketpair())
    assert writer(slots).send(here, FRAME, [memoryview(b"ab"), memoryview(b"cde")]) == 40 == here.sent
    assert there.frame() == replace(FRAME, flags=SHARED)
    assert slots.slot(FRAME).tobytes() == b"abcde"
    here.close()
    there.close()


def test_the_memory_of_somebody_else_is_not_written(blocks):
    with pytest.raises(TransportError, match="not the memory of this peer"):
        writer(Slots(blocks, 4, 100), mark="00" * 16)


@pytest.mark.parametrize("change", [{"slot": 4}, {"slot": 65535}, {"length": 101}])
def test_there_is_nothing_outside_of_the_slots(blocks, change):
    with pytest.raises(CodecError, match="there are 4 slots of 100 bytes"):
        Slots(blocks, 4, 100).slot(replace(FRAME, **change))


def test_a_slot_that_the_block_has_not_is_not_written(blocks):
    slots = Slots(blocks, 4, 1 << 14)
    with pytest.raises(TransportError, match="outside of the shared memory"):
        writer(slots).send(None, replace(FRAME, slot=40), [memoryview(b"abcde")])


def test_memory_is_lent_again(blocks):
    slots = Slots(blocks, 4, 100)
    slots.close()
    assert Slots(blocks, 4, 100).block is slots.block


def test_a_pool_serves_many_streams(monkeypatch):
    made = []
    monkeypatch.setattr(shared.Slots, "__init__", lambda self, *a, real=shared.Slots.__init__: (made.append(a), real(self, *a))[1])
    with Listener(job=1, token=TOKEN) as far, Link(far.address, job=1, token=TOKEN, chunk=1000) as link:
        for number in range(3):
            assert link.put(content(bytes(5000)), number=number).wire == 5 * 56
    assert len(made) == 1


def test_chunks_of_another_size_in_the_same_memory():
    """The receiver cuts its memory anew for a longer chunk; the sender is told, and writes there."""
    with Listener(job=1, token=TOKEN) as far:
        channel = dial(far.address)
        enter(channel, 1, TOKEN)
        outbox = Outbox(channel, ("shared",))
        for number, chunk in enumerate((100, 2000)):
            outgoing = Outgoing(Plan(Name(1, 0, number), 5000, chunk), content(bytes(range(250)) * 20), 4, Pace(60.0), 5)
            outgoing.push(outbox)
            outgoing.close()
            assert far.get(5).memory.numpy().tobytes() == bytes(range(250)) * 20
            assert outgoing.sender.counters.resent == 0
        outbox.close()
        channel.close()


@pytest.mark.parametrize("chunk", [-8, 0])
def test_slots_that_cannot_be_are_not_written(blocks, chunk):
    with pytest.raises(TransportError, match="outside of the shared memory"):
        writer(Slots(blocks, 4, 100), chunk=chunk).send(None, replace(FRAME, slot=1), [memoryview(b"abcde")])


def test_without_shared_memory_chunks_travel_inline(monkeypatch):
    def nothing(name):
        raise TransportError(f"{name}: no such block of shared memory")

    monkeypatch.setattr(shared, "attach", nothing)
    with Listener(job=1, token=TOKEN) as far, Link(far.address, job=1, token=TOKEN, chunk=1000) as link:
        assert link.put(content(bytes(5000))).wire == 5000 + 5 * 56
        assert far.get(5).memory.numpy().tobytes() == bytes(5000)


def test_a_pool_is_not_larger_than_allowed():
    with Listener(job=1, token=TOKEN, pool=7999) as far, Link(far.address, job=1, token=TOKEN, chunk=1000, window=8) as link:
        assert link.put(content(bytes(5000))).wire == 5000 + 5 * 56


def test_a_way_that_fails_is_left_for_tcp(monkeypatch):
    """Slots whose bytes never arrive: after five losses of a chunk the rest goes inline."""
    monkeypatch.setattr(shared, "copy", lambda target, source: None)
    with Listener(job=1, token=TOKEN) as far, Link(far.address, job=1, token=TOKEN, chunk=1000, window=2) as link:
        counters = link.put(content(bytes([7]) * 5000))
        assert far.get(5).memory.numpy().tobytes() == bytes([7]) * 5000
    assert counters.damaged >= 5 and counters.connections == 1
