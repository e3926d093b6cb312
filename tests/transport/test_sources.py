import select

import pytest
import torch

from hanse.core import wire
from hanse.core.errors import TransportError
from hanse.transport.frames import Name
from hanse.transport.sources import Ahead, Source, content, message
from hanse.transport.stream import Plan, prepared


def ahead(source, chunk, window, skip=0):
    plan = Plan(Name(1, 2, 3), source.size, chunk)
    return plan, Ahead(plan, source, window, skip)


def wait(maker):
    select.select([maker.wake], [], [], 5)
    return maker.take()


def test_no_more_is_made_than_may_be_held():
    made = []

    def pieces():
        for n in range(10):
            made.append(n)
            yield memoryview(bytes([n]) * 10)

    plan, maker = ahead(Source(100, pieces), 10, 3)
    found = []
    while len(found) < 3:
        found += wait(maker)
    maker._thread.join(0.05)
    assert made == [0, 1, 2] and maker.take() == []
    while len(found) < plan.count:
        maker.free(1)
        found += wait(maker)
        assert len(made) == len(found)
    assert b"".join(b"".join(c.parts) for c in found) == b"".join(bytes([n]) * 10 for n in range(10))
    maker.close()


def test_of_chunks_that_are_there_only_the_digest_is_made():
    data = bytes(range(100))
    plan, maker = ahead(content(data), 10, 2, (1 << 10) - 1)
    found = []
    while len(found) < 10:
        found += wait(maker)
    assert all(c.parts == () for c in found)
    assert found[3].digest == prepared(plan, 3, [memoryview(data[30:40])]).digest
    maker.close()


def test_closing_does_not_wait_for_credits():
    _, maker = ahead(content(bytes(100)), 10, 1)
    wait(maker)
    maker.close()
    assert not maker._thread.is_alive()


@pytest.mark.parametrize("size", [9, 11])
def test_a_source_of_another_size(size):
    _, maker = ahead(Source(size, lambda: [memoryview(bytes(10))]), 100, 1)
    with pytest.raises(TransportError, match=f"the source gave 10 bytes and said {size}"):
        while True:
            maker.free(len(wait(maker)))
    maker.close()


def test_a_message_is_sent_from_where_it_lies():
    x = torch.arange(1000.0)
    source = message({"x": x}, {"a": "b"})
    pieces = list(source.pieces())
    assert sum(len(p) for p in pieces) == source.size == wire.wire_size({"x": x}, about={"a": "b"})
    x[0] = 77
    assert torch.equal(wire.read(b"".join(pieces))[0]["x"], x)
