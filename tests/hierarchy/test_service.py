"""Means by real processes: equal to the flat mean in any shape and order, with bounded memory and nothing left."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from means import SIZE, flat, mean, until, updates

from hanse.core.errors import ConfigError, TransportError
from hanse.hierarchy.service import Aggregation
from hanse.hierarchy.store import RESULTS, UPDATES


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


@pytest.mark.parametrize("weight", [1.0, 37.0])
def test_two_equal_clients_give_exactly_the_mean(weight: float) -> None:
    x, _ = updates(2)
    with Aggregation(SIZE) as service:
        round = service.round(2)
        round.put(x[0], weight)
        task, _ = round._places[0]
        until(lambda: task.out is not None and torch.equal(task.out.values, x[0]))  # added before the second has come
        round.put(x[1], weight)
        found, _ = round.finish()
    assert torch.equal(found, (x[0] + x[1]) / 2)


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
                until(lambda: service.pump(0) or service.counters.inter_bytes == 4 * SIZE)
            round.put(x[i], weights[i])
        found, _ = round.finish()
    assert torch.allclose(found.double(), flat(x, weights), rtol=0, atol=1e-5)


def test_24_bytes_a_hop(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    tell = Aggregation._tell
    monkeypatch.setattr(Aggregation, "_tell", lambda self, worker, events: (sent.extend(events), tell(self, worker, events))[1])
    x, weights = updates(6)
    with Aggregation(SIZE, workers=1, fan_in=3) as service:
        mean(service, x, weights)
        # Two groups: a start, three updates, an end and an answer; the second has the first one's result too; it is forgotten.
        assert service.counters.events == len(sent) + 2 == (1 + 3 + 1 + 1) + (1 + 1 + 3 + 1 + 1) + 1
    assert all(len(event.pack()) == 24 for event in sent)


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


def test_results_stay_when_the_service_is_gone() -> None:
    x, weights = updates(5)
    with Aggregation(SIZE) as service:
        first = mean(service, x, weights)
        kept = first.clone()
        mean(service, -x, weights)
        assert service.nodes[0].store.used == [0, 0]
    assert torch.equal(first, kept)


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
        ({"idle": 0.0}, r"idle: 0\.0; allowed: more than 0"),
        ({"idle": float("inf")}, "idle: inf"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Aggregation(**{"size": SIZE, **settings})


def test_shelves_hold_types_of_their_own() -> None:
    with Aggregation(SIZE, accumulate="float64") as service:
        store = service.nodes[0].store
        assert (store.dtypes[UPDATES], store.dtypes[RESULTS]) == (torch.float32, torch.float64)
