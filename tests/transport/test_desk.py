"""What a receiver has of which streams, whoever asks at the same time."""

import threading
from contextlib import suppress

import pytest
import torch

from hanse.core.errors import TransportError
from hanse.transport import desk
from hanse.transport.desk import Desk, Incoming
from hanse.transport.frames import Name
from hanse.transport.stream import Plan

PLAN = Plan(Name(1, 2, 3), 1000, 100)


class Cut:
    """A connection that only tells whether it was cut."""

    def __init__(self):
        self.cut = threading.Event()

    def abort(self):
        self.cut.set()


def test_a_stream_that_two_connections_open_at_once_is_one():
    class Slow(Desk):
        """What two of them may do at the same time takes long enough for that."""

        def forget(self, name):
            super().forget(name)
            with suppress(threading.BrokenBarrierError):
                barrier.wait(0.5)

    tested, barrier, found = Slow(1, 10**6), threading.Barrier(2), []
    running = [threading.Thread(target=lambda: found.append(tested.open(PLAN))) for _ in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert found[0] is found[1]


def test_another_stream_of_that_name_takes_its_place():
    tested = Desk(1, 1000)
    first = tested.open(PLAN)
    second = tested.open(Plan(PLAN.name, 900, 100))
    assert second is not first and tested.open(Plan(PLAN.name, 900, 100)) is second


def test_a_stream_that_was_given_up_is_not_received(tmp_path):
    """A connection that has opened it and does not own it yet."""
    tested = Desk(1, 1000, folder=tmp_path)
    incoming = tested.open(PLAN)
    tested.forget(PLAN.name)
    with pytest.raises(ConnectionError, match="stream 3 of round 2"), incoming.owned(Cut()):
        raise AssertionError("it is owned")
    assert not list(tmp_path.iterdir())


def test_who_comes_to_own_a_stream_while_another_waits_for_it_is_cut():
    incoming = Desk(1, 1000).open(PLAN)
    early, late, owned = Cut(), Cut(), threading.Event()

    def run():
        with incoming.owned(late):
            owned.set()

    with incoming._lock:  # between two owners
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        incoming._channel = early
        assert early.cut.wait(5)
        incoming._channel = None
    assert owned.wait(5)


@pytest.mark.parametrize(
    "memory",
    [
        lambda name, size: torch.empty(1 << 55, dtype=torch.uint8),
        lambda name, size: {}[name],
        lambda name, size: torch.empty(size - 1, dtype=torch.uint8),
        lambda name, size: torch.empty(size, dtype=torch.int8),
        lambda name, size: torch.empty(size, dtype=torch.uint8, device="meta"),
    ],
    ids=["too much", "no such name", "short", "int8", "elsewhere"],
)
def test_no_memory_is_said_in_words(memory):
    with pytest.raises(TransportError, match=r"stream 3 of round 2: there is no memory for its 1,000 bytes"):
        Desk(1, 1000, memory).open(PLAN)


def test_so_many_streams_are_taken_however_short_they_are(monkeypatch):
    monkeypatch.setattr(desk, "MOST_STREAMS", 2)
    tested = Desk(1, 1000)
    first = tested.open(Plan(Name(1, 0, 0), 0, 1))
    tested.open(Plan(Name(1, 0, 1), 0, 1))
    assert isinstance(first, Incoming)
    for finish in (lambda: tested.finish(first), lambda: tested.collected(0)):
        with pytest.raises(TransportError, match="2 streams are taken at a time"):
            tested.open(Plan(Name(1, 0, 2), 0, 1))
        finish()
    assert tested.open(Plan(Name(1, 0, 2), 0, 1))
