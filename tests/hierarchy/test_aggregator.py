"""The program that aggregators run, here in the process of the tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from hanse.hierarchy.aggregator import Aggregator, serve
from hanse.hierarchy.events import SIZE, Event, Kind, Shelf, unpack
from hanse.hierarchy.partial import Vector
from hanse.transport.blocks import Blocks

START, INPUT, CLOSE, DONE = Kind.START, Kind.INPUT, Kind.CLOSE, Kind.DONE


class Ends:
    """Both ends of an aggregator's sockets, and a shelf of four vectors of ones, twos, threes and fours."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        self.data, their_data = socket.socketpair()
        self.blocks = Blocks()
        for _ in range(5):
            self.blocks.take(400)
        self.shelf = Shelf(str(self.blocks.folder), "float32", 100)
        for i in range(5):
            self.shelf.view(i)[:] = i
        self.theirs = theirs, their_data
        self.aggregator = Aggregator(theirs, their_data, [self.shelf])

    def view(self, block: int) -> Vector:
        return self.shelf.view(block)

    def answer(self) -> Event:
        (event,) = unpack(self.control.recv(SIZE))
        return event


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    for s in (made.control, made.data, *made.theirs):
        s.close()
    made.blocks.close()


def test_it_adds_on_arrival_and_answers_after_the_last(ends: Ends) -> None:
    ends.aggregator.take([Event(START, 0, 0, 9), Event(INPUT, 0, 1, weight=2)])
    assert bool((ends.view(0) == 1).all())  # the first is there before the second has come
    ends.aggregator.take([Event(INPUT, 0, 2, weight=2)])
    assert bool((ends.view(0) == 3).all())
    ends.aggregator.take([Event(INPUT, 0, 4, weight=1), Event(CLOSE)])
    done = ends.answer()
    assert (done.kind, done.block, done.weight) == (DONE, 0, 5)
    assert np.allclose(ends.view(0), (2 * 1 + 2 * 2 + 4) / 5)


def test_closed_early_it_gives_the_mean_of_what_there_is(ends: Ends) -> None:
    ends.aggregator.take([Event(START, 0, 0), Event(INPUT, 0, 1, weight=1), Event(INPUT, 0, 3, weight=3), Event(CLOSE)])
    assert ends.answer().weight == 4 and np.allclose(ends.view(0), 2.5)


def test_several_means_at_once_and_nothing_left_of_the_last(ends: Ends) -> None:
    ends.aggregator.take(
        [
            Event(START, 0, 0),
            Event(INPUT, 0, 4, weight=2),
            Event(CLOSE),
            Event(START, 0, 1),
            Event(INPUT, 0, 2, weight=1),
            Event(INPUT, 0, 3, weight=1),
            Event(CLOSE),
        ]
    )
    assert [ends.answer().weight, ends.answer().weight] == [2, 2]
    assert np.allclose(ends.view(0), 4) and np.allclose(ends.view(1), 2.5)


def test_a_block_is_sent_as_it_lies(ends: Ends) -> None:
    ends.aggregator.take([Event(Kind.SEND, 0, 3)])
    assert ends.data.recv(4000) == ends.view(3).tobytes()


def test_events_in_pieces_and_the_end(ends: Ends) -> None:
    worker = threading.Thread(target=serve, args=(*ends.theirs, 60.0, [ends.shelf]))
    worker.start()
    text = Event(START, 0, 0).pack() + Event(INPUT, 0, 2, weight=1).pack() + Event(CLOSE).pack()
    for cut in (text[:5], text[5:30], text[30:]):
        ends.control.sendall(cut)
    assert ends.answer().weight == 1
    ends.control.close()
    worker.join(10)
    assert not worker.is_alive()


def test_without_work_it_ends_by_itself(ends: Ends) -> None:
    serve(*ends.theirs, 0.01, [ends.shelf])
    assert ends.aggregator.partial is None
