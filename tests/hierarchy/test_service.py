"""Means by real processes: equal to the flat mean in any shape and order, after crashes too, without copies and leaks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hanse.core.errors import ConfigError, HanseError, TransportError
from hanse.core.layout import Layout
from hanse.hierarchy.service import Aggregation, Round
from hanse.hierarchy.store import RESULTS, UPDATES

SIZE = 1000


def updates(clients: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[float]]:
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randint(1, 500, (clients,), generator=draw).double()
    return torch.randn(clients, SIZE, generator=draw, dtype=dtype), weights.tolist()


def flat(x: Tensor, weights: list[float]) -> Tensor:
    return (x.double() * torch.tensor(weights, dtype=torch.float64)[:, None]).sum(0) / sum(weights)


def folders(service: Aggregation) -> list[Path]:
    return [shelf.folder for node in service.nodes for shelf in node.store.shelves]


def mean(service: Aggregation, x: Tensor, weights: list[float], turn: list[int] | None = None, order: Any = "arrival") -> Tensor:
    """The mean of one round, in which clients come in ``turn``."""
    round = service.round(len(x), order=order)
    for i in turn or range(len(x)):
        assert round.put(x[i], weights[i], i if order == "place" else None)
    found, weight = round.finish()
    assert weight == sum(weights) and service.needed == 0
    return found


def until(happened: Callable[[], bool]) -> None:
    for _ in range(1000):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it does not happen")


# Check 1


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(
    ("accumulate", "dtype", "within"),
    [("float32", "float32", 1e-6), ("float64", "float32", 1e-12), ("float64", "float64", 1e-12), ("float32", "float16", 1e-6)],
)
def test_random_trees_and_orders_give_the_flat_mean(eager: bool, accumulate: Any, dtype: str, within: float) -> None:
    draw = random.Random(0)
    for nodes, workers, fan_in, capacity in ((1, 1, 2, None), (1, 3, 3, None), (3, 1, 2, 5)):
        shape = {"nodes": nodes, "workers": workers, "fan_in": fan_in, "capacity": capacity}
        with Aggregation(SIZE, dtype=dtype, accumulate=accumulate, eager=eager, **shape) as service:  # type: ignore[arg-type]
            for clients in (1, 2, 3, draw.randrange(4, 14), 14):
                x, weights = updates(clients, clients, getattr(torch, dtype))
                found = mean(service, x, weights, draw.sample(range(clients), clients))
                assert found.dtype is getattr(torch, accumulate)
                assert (found - flat(x, weights)).abs().max() <= within * x.abs().max()


def test_with_fixed_places_bits_depend_on_nothing_else() -> None:
    x, weights = updates(11)
    found = []
    for eager in (True, False):
        with Aggregation(SIZE, workers=2, fan_in=2, eager=eager, budget=1_000_000) as service:
            found += [mean(service, x, weights, random.Random(seed).sample(range(11), 11), "place") for seed in range(3)]
    assert all(torch.equal(found[0], other) for other in found)


# Check 2


@pytest.mark.parametrize("weight", [1.0, 37.0])
def test_two_equal_clients_give_exactly_the_mean(weight: float) -> None:
    x, _ = updates(2)
    with Aggregation(SIZE) as service:
        round = service.round(2)
        round.put(x[0], weight)
        until(lambda: worked(service, round))
        round.put(x[1], weight)
        found, _ = round.finish()
    assert torch.equal(found, (x[0] + x[1]) / 2)


def worked(service: Aggregation, round: Round) -> bool:
    """Whether the first update of a round has been added before the second has come."""
    task = round._task[0][0]
    (first,) = task.present
    return task.out is not None and torch.equal(task.out.values, first.values)


# Checks 3 and 4


@pytest.mark.parametrize(("clients", "used"), [(5, 1), (6, 2), (15, 3), (16, 4)])
def test_results_of_all_used_nodes_but_one_travel(clients: int, used: int) -> None:
    x, weights = updates(clients)
    with Aggregation(SIZE, nodes=4, workers=1, capacity=5) as service:
        found = mean(service, x, weights)
        assert [node.arrived > 0 for node in service.nodes] == [True] * used + [False] * (4 - used)
        assert service.counters.inter_bytes == (used - 1) * SIZE * 4
    assert torch.allclose(found.double(), flat(x, weights), rtol=0, atol=1e-6 * float(x.abs().max()))


def test_the_top_does_not_hold_the_process_that_it_waits_for() -> None:
    x, weights = updates(5)
    with Aggregation(SIZE, nodes=2, workers=1, fan_in=2, capacity=[2, 5]) as service:
        round = service.round(5)
        for i in range(5):
            if i == 2:  # the other node's result is at the top's before its own leaf begins
                until(lambda: service._pump(0) or service.counters.inter_bytes == 4 * SIZE)
            round.put(x[i], weights[i])
        found, _ = round.finish()
    assert torch.allclose(found.double(), flat(x, weights), rtol=0, atol=1e-5)


# Check 5


def test_an_aggregator_reads_the_memory_that_was_written() -> None:
    x, _ = updates(2)
    with Aggregation(SIZE, eager=False) as service:
        round, room = service.round(2), service.lend()
        room.values.copy_(x[0])
        round.hand_in(room)
        room.values.copy_(x[1])  # after it was handed in: a copy made then would not see it
        assert round._task[0][0].present[0].values.data_ptr() == room.values.data_ptr()
        round.put(x[1])
        found, _ = round.finish()
        assert torch.equal(found, x[1])
        assert service.counters.copies == 1 and service.counters.copied_bytes == 4 * SIZE


def test_24_bytes_a_hop(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    tell = Aggregation._tell
    monkeypatch.setattr(Aggregation, "_tell", lambda self, worker, events: (sent.extend(events), tell(self, worker, events))[1])
    x, weights = updates(6)
    with Aggregation(SIZE, workers=1, fan_in=3) as service:
        mean(service, x, weights)
        # Two groups: each a start, three updates and an answer; the second has the first one's result too; the result is forgotten.
        assert service.counters.events == len(sent) + 2 == (1 + 3 + 1) + (1 + 1 + 3 + 1) + 1
    assert all(len(event.pack()) == 24 for event in sent)


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


# Check 6


def test_a_killed_aggregator_is_replaced_and_its_inputs_added_again() -> None:
    x, weights = updates(8)
    with Aggregation(SIZE, workers=2, fan_in=4) as service:
        whole = mean(service, x, weights)
        round, starts = service.round(8), service.counters.starts
        for i in range(8):
            if i in (2, 7):
                task = round._task[i][0]
                assert task.worker is not None
                os.kill(task.worker.process.pid, signal.SIGKILL)
                until(lambda task=task: service._pump(0) or task.attempts > 0)
            round.put(x[i], weights[i])
        found, _ = round.finish()
        assert torch.equal(found, whole)
        assert service.counters.redone == 2 and service.counters.starts > starts and service.needed == 0
        left = folders(service)
        assert all(folder.exists() for folder in left)
    assert not any(folder.exists() for folder in left)


def test_a_killed_sender_sends_again() -> None:
    x, weights = updates(4)
    with Aggregation(SIZE, nodes=2, workers=1, fan_in=2, capacity=2) as service:
        whole = mean(service, x, weights)
        round = service.round(4)
        for i in range(4):
            round.put(x[i], weights[i])
        for pid in service.aggregators:
            os.kill(pid, signal.SIGKILL)
        found, _ = round.finish()
        assert torch.equal(found, whole) and service.counters.redone >= 1 and service.needed == 0


def test_what_kills_every_aggregator_ends_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Aggregation(SIZE) as service:
        round = service.round(2)
        with pytest.raises(TransportError, match="3 have ended over the same task, the last with 1"):
            for row in updates(2)[0]:
                round.put(row)
            round.finish()


def test_a_killed_server_leaves_neither_processes_nor_memory() -> None:
    killed = """
import os, signal, torch
from hanse.hierarchy.service import Aggregation
service = Aggregation(1000)
round = service.round(4)
round.put(torch.ones(1000))
print(*service.aggregators, *(shelf.folder for shelf in service.nodes[0].store.shelves), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    pid, *left = subprocess.run([sys.executable, "-c", killed], stdout=subprocess.PIPE, text=True).stdout.split()
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    with Aggregation(SIZE):
        assert not any(Path(folder).exists() for folder in left)


# Check 7


def test_in_steady_load_nothing_is_started_after_the_first_round() -> None:
    x, weights = updates(12)
    with Aggregation(SIZE, nodes=2, workers=2, fan_in=2, capacity=8, idle=60) as service:
        mean(service, x, weights)
        first, promoted = service.counters.starts, service.counters.promotions
        for _ in range(5):
            mean(service, x, weights)
        assert service.counters.starts == first <= 4
        assert service.counters.promotions > promoted and service.counters.redone == 0


def test_idle_aggregators_end_and_come_back() -> None:
    x, weights = updates(3)
    with Aggregation(SIZE, workers=1, idle=0.05) as service:
        one = mean(service, x, weights)
        (worker,) = service.nodes[0].workers
        until(lambda: worker.process.poll() is not None)
        assert torch.equal(mean(service, x, weights), one)
        assert service.counters.starts == 2 and service.counters.node_seconds > 0


def test_aggregators_are_warm_when_a_round_begins_and_the_estimate_asks_for_them() -> None:
    x, weights = updates(4)
    with Aggregation(SIZE, workers=2) as service:
        mean(service, x, weights)
        assert service.nodes[0].queue is not None and service.nodes[0].queue > 0
        service.nodes[0].queue = 8.0
        service.round(4)
        assert len(service.aggregators) == 2


# Edges


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


def test_memory_does_not_grow_with_the_number_of_updates() -> None:
    peaks = []
    for clients in (40, 120):
        x, weights = updates(clients)
        with Aggregation(SIZE, workers=1, fan_in=2) as service:
            mean(service, x, weights)
            peaks.append(service.peak_bytes)
    assert max(peaks) <= (2 * 2 + 4) * SIZE * 4


def test_a_full_store_waits_or_says_that_it_cannot() -> None:
    least = (2 + 4) * SIZE * 4
    x, weights = updates(9)
    with pytest.raises(ConfigError, match=f"budget: {least - 1:,}; allowed: {least:,} bytes or more"):
        Aggregation(SIZE, workers=1, fan_in=2, budget=least - 1)
    with Aggregation(SIZE, workers=1, fan_in=2, budget=least) as service:
        assert torch.allclose(mean(service, x, weights).double(), flat(x, weights), rtol=0, atol=1e-5)
        round = service.round(9, order="place")
        round.put(x[1], place=1)
        round.put(x[3], place=3)
        with pytest.raises(TransportError, match="budget: updates fill"):  # only place 0 could make room
            round.put(x[4], place=4)


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
        assert round.finish(out)[0] is out and service.needed == 0
        assert torch.equal(out, mean(service, x, weights))


def test_results_stay_when_the_service_is_gone() -> None:
    x, weights = updates(5)
    with Aggregation(SIZE) as service:
        first = mean(service, x, weights)
        kept = first.clone()
        mean(service, -x, weights)
        assert service.nodes[0].store.used == [0, 0]
    assert torch.equal(first, kept)


def test_aggregators_let_go_of_results_that_were_given_out() -> None:
    x, weights = updates(5)
    with Aggregation(SIZE, workers=1) as service:
        for _ in range(4):
            mean(service, x, weights)
        (pid,) = service.aggregators
        maps = Path(f"/proc/{pid}/maps")
        until(lambda: not any("hanse-" in line and "(deleted)" in line for line in maps.read_text().splitlines()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size: 0"),
        ({"nodes": 0}, "nodes: 0"),
        ({"workers": 0}, "workers: 0"),
        ({"fan_in": 1}, "fan_in: 1; allowed: 2 or more"),
        ({"dtype": "int64"}, "dtype, accumulate: int64"),
        ({"accumulate": "float16"}, "float16; allowed"),
        ({"capacity": [1, 2]}, r"capacity: \[1, 2\]"),
        ({"capacity": -1}, "capacity"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Aggregation(**{"size": SIZE, **settings})


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


def test_shelves_hold_types_of_their_own() -> None:
    with Aggregation(SIZE, accumulate="float64") as service:
        store = service.nodes[0].store
        assert (store.dtypes[UPDATES], store.dtypes[RESULTS]) == (torch.float32, torch.float64)
