import socket
from dataclasses import replace

import pytest

from hanse.core.errors import CodecError, TransportError
from hanse.transport import shared
from hanse.transport.blocks import Blocks
from hanse.transport.frames import INLINE, SHARED, Frame, Name
from hanse.transport.peers import Link, Listener
from hanse.transport.shared import Slots, Writer
from hanse.transport.sources import content
from hanse.transport.tcp import Channel
from tests.transport.processes import TOKEN

FRAME = Frame(INLINE, 2, Name(1, 2, 3), 0, 1, 5, 0)


@pytest.fixture
def blocks():
    made = Blocks()
    yield made
    made.close()


def writer(slots):
    offer = slots.offer()
    return Writer(offer["block"], offer["mark"], offer["chunk"])


def test_what_is_written_lies_in_the_slot_and_only_the_header_travels(blocks):
    slots = Slots(blocks, 4, 100)
    here, there = (Channel(end) for end in socket.socketpair())
    assert writer(slots).send(here, FRAME, [memoryview(b"ab"), memoryview(b"cde")]) == 40 == here.sent
    assert there.frame() == replace(FRAME, flags=SHARED)
    assert slots.slot(FRAME).tobytes() == b"abcde"
    here.close()
    there.close()


def test_the_memory_of_somebody_else_is_not_written(blocks):
    offer = Slots(blocks, 4, 100).offer()
    with pytest.raises(TransportError, match="not the memory of this peer"):
        Writer(offer["block"], "00" * 16, 100)


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
