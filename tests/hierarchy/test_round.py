"""What is put and handed in: without copies, late, weightless, too little, too much."""

from __future__ import annotations

import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from means import SIZE, flat, mean, updates

from hanse.core.errors import ConfigError, HanseError, TransportError
from hanse.core.layout import Layout
from hanse.hierarchy.round import Round
from hanse.hierarchy.service import Aggregation


def test_an_aggregator_reads_the_memory_that_was_written() -> None:
    x, _ = updates(2)
    with Aggregation(SIZE, eager=False) as service:
        round, room = service.round(2), service.lend()
        room.values.copy_(x[0])
        round.hand_in(room)
        room.values.copy_(x[1])  # after it was handed in: a copy made then would not see it
        assert round._places[0][0].present[0].values.data_ptr() == room.values.data_ptr()
        round.put(x[1])
        found, _ = round.finish()
        assert torch.equal(found, x[1])
        assert service.counters.copies == 1 and service.counters.copied_bytes == 4 * SIZE


def test_other_processes_fill_memory_in_place() -> None:
    fill = (
        "import sys; from hanse.transport.blocks import attach; attach(sys.argv[1])[:4000].view(__import__('torch').float32)[:] = 3"
    )
    with Aggregation(SIZE) as service:
        round, room = service.round(1), service.lend()
        subprocess.run([sys.executable, "-c", fill, room.name], check=True)
        round.hand_in(room, 5)
        found, weight = round.finish()
        assert service.counters.copies == 0 and service.counters.starts == 0  # a single update is the result
    assert bool((found == 3).all()) and weight == 5


def test_memory_that_is_kept_counts_as_often_as_it_is_handed_in() -> None:
    x, _ = updates(2)
    with Aggregation(SIZE) as service:
        round, room = service.round(4), service.lend()
        room.values.copy_(x[0])
        for _ in range(3):
            round.hand_in(room, 2, keep=True)
        with pytest.raises(ConfigError, match=r"weight: 1\.0; allowed: 2"):
            round.hand_in(room, keep=True)
        round.put(x[1], 2)
        found, weight = round.finish()
        assert weight == 8 and torch.allclose(found, (3 * x[0] + x[1]) / 4)
        assert service.needed == 1
        room.release()
        assert service.needed == 0


@pytest.mark.parametrize("freed", [True, False])
def test_a_result_that_no_memory_is_left_for_ends_the_round_at_most(freed: bool) -> None:
    x, _ = updates(2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Aggregation(SIZE, workers=1) as service:
        round, rooms = service.round(3), [service.lend(), service.lend()]
        for room, row in zip(rooms, x, strict=True):
            room.values.copy_(row)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # files in shared memory are files
        try:
            for room in rooms:
                with pytest.raises(TransportError, match="no room for"):
                    round.hand_in(room)
            if not freed:
                with pytest.raises(TransportError, match="no room for"):
                    round.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if freed:
            assert torch.equal(round.finish()[0], (x[0] + x[1]) / 2)
        assert service.needed == 0 and torch.equal(mean(service, x, [1, 1]), (x[0] + x[1]) / 2)


def test_fewer_than_expected_are_averaged_as_they_are() -> None:
    x, weights = updates(3)
    with Aggregation(SIZE, workers=2, fan_in=2) as service:
        round = service.round(40)
        for row, weight in zip(x, weights, strict=True):
            round.put(row, weight)
        found, weight = round.finish()
        assert weight == sum(weights) and torch.allclose(found.double(), flat(x, weights), rtol=0, atol=1e-5)
        with pytest.raises(ConfigError, match="it has been finished"):
            round.finish()
        assert not round.put(x[0]) and service.counters.late == 1


def test_hardly_any_of_very_many_expected() -> None:
    x, weights = updates(3)
    with Aggregation(SIZE, workers=1, fan_in=2) as service:
        round = service.round(10_000)
        for row, weight in zip(x, weights, strict=True):
            round.put(row, weight)
        assert torch.allclose(round.finish()[0].double(), flat(x, weights), rtol=0, atol=1e-5)


def test_late_updates_are_counted_and_dropped() -> None:
    x, _ = updates(3)
    with Aggregation(SIZE) as service:
        round, room = service.round(2), service.lend()
        assert round.put(x[0]) and round.put(x[1]) and not round.put(x[2]) and not round.hand_in(room)
        round.finish()
        over = service.round(2, deadline=0)
        assert not over.put(x[0])
        with pytest.raises(HanseError, match="nothing with a weight"):
            over.finish()
        assert service.counters.late == 3 and service.needed == 0
        assert torch.equal(mean(service, x, [1, 1, 1]), mean(service, x, [1, 1, 1]))


def test_what_weighs_nothing_is_dropped() -> None:
    x, _ = updates(3)
    x[1] = torch.nan
    with Aggregation(SIZE) as service:
        round = service.round(3)
        for row, weight in zip(x, (1.0, 0.0, 1.0), strict=True):
            assert round.put(row, weight)
        found, weight = round.finish()
    assert weight == 2 and torch.equal(found, (x[0] + x[2]) / 2)


def test_named_tensors_are_laid_out() -> None:
    layout = Layout({"w": (4, 5), "b": (3,)})
    named = [{"w": torch.full((4, 5), float(i)), "b": torch.full((3,), -float(i))} for i in (1, 3)]
    with Aggregation(layout) as service:
        round = service.round(2)
        for tensors in named:
            round.put(tensors)
        for bad, message in (
            ({"w": named[0]["w"]}, "b: nothing"),
            ({**named[0], "n": torch.tensor(1)}, r"n: \(\); allowed: nothing"),
            ({**named[0], "b": torch.ones(3, dtype=torch.int64)}, "b: torch.int64; allowed: torch.float32"),
        ):
            with pytest.raises(ConfigError, match=message):
                service.lend().release()
                Round(service, [0], "arrival", None).put(bad)
        views = layout.views(round.finish()[0])
        assert bool((views["w"] == 2).all()) and bool((views["b"] == -2).all()) and service.needed == 0


def test_into_memory_of_the_callers() -> None:
    x, weights = updates(5)
    out = torch.empty(SIZE)
    with Aggregation(SIZE) as service:
        round = service.round(5)
        for row, weight in zip(x, weights, strict=True):
            round.put(row, weight)
        for wrong in (torch.empty(SIZE - 1), torch.empty(2, SIZE)):
            with pytest.raises(ConfigError, match=r"out: \(.*\); allowed: \(1000,\)"):
                round.finish(wrong)
        assert round.finish(out)[0] is out and service.needed == 0
        assert torch.equal(out, mean(service, x, weights))


def test_updates_and_places_that_cannot_be() -> None:
    x, _ = updates(1)
    with Aggregation(SIZE, nodes=2, capacity=1) as service:
        with pytest.raises(ConfigError, match="expected: 0"):
            service.round(0)
        with pytest.raises(ConfigError, match="order: 'any'"):
            service.round(1, order="any")  # type: ignore[arg-type]
        round = service.round(2, order="place")
        with pytest.raises(ConfigError, match="the last one is not finished"):
            service.round(2)
        for update, weight, place, message in (
            (x[0], -1.0, 0, "weight: -1.0"),
            (x[0], float("nan"), 0, "weight: nan"),
            (x[0], 1.0, None, "place: None; allowed: a number"),
            (x[0], 1.0, 2, "place: 2; allowed: each number from 0 to 1 once"),
            (x[0, 1:], 1.0, 0, r"update: \(999,\); allowed: \(1000,\)"),
            (x[0].double(), 1.0, 0, "update: torch.float64; allowed: torch.float32"),
            ({"w": x[0]}, 1.0, 0, "named tensors; allowed: a vector"),
        ):
            with pytest.raises(ConfigError, match=message):
                round.put(update, weight, place)
        room = service.lend(1)
        with pytest.raises(ConfigError, match="place: 0 is on node 0; allowed: those on node 1"):
            round.hand_in(room, 1.0, 0)
        room.release()
        assert round.put(x[0], place=0)
        with pytest.raises(ConfigError, match="place: 0"):
            round.put(x[0], place=0)
        assert np.array_equal(round.finish()[0], x[0]) and service.needed == 0
