"""Ways to a mean that are timed side by side, and the table."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hanse.bench import aggregation
from hanse.bench.aggregation import COPIES, FLAT, HEADERS, LARGE, cells, exchange, measure, rows, sources
from hanse.core.errors import HanseError


@pytest.mark.parametrize("who", [*COPIES, FLAT])
def test_all_ways_give_the_mean_of_the_same_updates(who: str) -> None:
    size = 1000
    buffers = sources(size)
    found = measure(who, 7, size)
    assert found["first"] == pytest.approx(float(torch.stack([buffers[i][0] for i in range(7)]).mean()), abs=1e-6)
    assert found["seconds"] > 0 and found["updates_s"] == pytest.approx(7 / found["seconds"])
    assert found["memory"] > 20e6 and found["cpu_s"] >= 0


def test_the_bound_is_that_of_this_machine() -> None:
    assert measure("bound", 0, 1000)["bytes_s"] > 1e6


def test_the_exchange_takes_every_segment_to_everybody() -> None:
    found = exchange(3500, clients=2, segment=1000)
    assert found["first"] == 1 and found["memory"] < 1.5e9


def fake(asked: list[Any], wrong: str = "") -> Any:
    def one(command: list[str]) -> dict[str, Any]:
        spec = json.loads(command[-1])
        asked.append(spec["who"])
        if spec["who"] == "bound":
            return {"bytes_s": 10.0}
        seconds = 8.0 if len(asked) > 6 else 4.0
        numbers = {"seconds": seconds, "updates_s": 32 / seconds, "cpu_s": 1.0, "client_cpu_s": 1.0, "memory": 1e9}
        return {"case": spec["who"], **spec, **numbers, "first": float(spec["who"] == wrong)}

    return one


def test_the_table_has_the_fastest_of_each_beside_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(aggregation, "ROWS", ((32, 1_000_000),))
    table = rows(2, fake(asked))
    assert asked == 2 * ["bound", *COPIES] + ["bound", FLAT, LARGE]
    assert [row["case"] for row in table] == [*COPIES, FLAT, LARGE]
    assert all(row["seconds"] == 4 and row["one"] == 8 and row["bound"] == 10 for row in table[:-2])
    assert all(len(cells(row)) == len(HEADERS) for row in table)
    monkeypatch.setattr(aggregation, "ROWS", ((512, 100_000_000),))
    asked.clear()
    rows(2, fake(asked))
    assert asked == ["bound", *COPIES, "bound", FLAT, LARGE]


def test_different_means_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "ROWS", ((32, 1_000_000),))
    with pytest.raises(HanseError, match="not the same mean"):
        rows(1, fake([], aggregation.TREE))
