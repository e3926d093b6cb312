"""Ways to a mean that are timed side by side, and the table."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

import pytest
import torch

from hanse.bench import aggregation
from hanse.bench.aggregation import (
    COPIES,
    FLAT,
    HEADERS,
    IN_PLACE,
    LARGE,
    LOCAL,
    ONE,
    TREE,
    bound,
    cells,
    exchange,
    free,
    measure,
    needs,
    rows,
)  # fmt: skip
from hanse.bench.players import Child, sources
from hanse.core.errors import HanseError


@pytest.mark.parametrize("who", [*COPIES, FLAT])
def test_all_ways_give_the_mean_of_the_same_updates(who: str) -> None:
    size = 1000
    buffers = sources(size)
    found = measure(who, 7, size)
    assert found["first"] == pytest.approx(float(torch.stack([buffers[i][0] for i in range(7)]).mean()), abs=1e-6)
    assert found["seconds"] > 0 and found["updates_s"] == pytest.approx(7 / found["seconds"])
    assert found["memory"] > 20e6 and found["cpu_s"] >= 0


def test_copying_and_adding_takes_longer_than_adding() -> None:
    found = bound(100_000, seconds=0.1)
    assert found["bound"] > found["copy_bound"] > 1e6


def test_the_exchange_takes_every_segment_to_everybody() -> None:
    found = exchange(3500, clients=2, segment=1000)
    assert found["first"] == 1 and found["memory"] < 1.5e9


def test_nobody_waits_for_who_waits_for_others() -> None:
    with Child("receiver", 1000, "-") as receiver:
        receiver.tell(1, 1)  # an update that never comes
    assert receiver.process.returncode == -signal.SIGKILL


def fake(asked: list[Any], wrong: str = "", slow: str = "") -> Any:
    def one(command: list[str], limit: float) -> dict[str, Any]:
        spec = json.loads(command[-1])
        asked.append(spec["who"])
        assert limit >= 600 + 4 * spec["size"] * spec["updates"] / 0.25e9
        if spec["who"] == slow:
            raise subprocess.TimeoutExpired(command, limit)
        if spec["who"] == "bound":
            return {"bound": 10.0, "copy_bound": 5.0}
        seconds = 8.0 if len(asked) > 6 else 4.0
        numbers = {"seconds": seconds, "updates_s": 32 / seconds, "cpu_s": 1.0, "client_cpu_s": 1.0, "memory": 1e9}
        return {"case": spec["who"], **spec, **numbers, "first": float(spec["who"] == wrong)}

    return one


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for everything."""
    monkeypatch.setattr(aggregation, "free", lambda: (10**15, 10**15))


@pytest.mark.usefixtures("room")
def test_the_table_has_the_fastest_of_each_beside_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(aggregation, "ROWS", ((32, 1_000_000),))
    table = rows(2, fake(asked))
    assert asked == 2 * ["bound", *COPIES] + ["bound", FLAT, LARGE]
    assert [row["case"] for row in table] == [*COPIES, FLAT, LARGE]
    assert all(row["seconds"] == 4 and row["one"] == 8 for row in table[:-2])
    for row in table:
        shown = dict(zip(HEADERS, cells(row), strict=True))
        rate = row["updates_s"] * 4 * row["size"]
        assert shown["of adding"] == f"{rate / 10:.2f}"
        assert shown["of copying and adding"] == ("" if row["case"] == IN_PLACE else f"{rate / 5:.2f}")
    monkeypatch.setattr(aggregation, "ROWS", ((512, 100_000_000),))
    asked.clear()
    rows(2, fake(asked))
    assert asked == ["bound", *COPIES, "bound", FLAT, LARGE]


@pytest.mark.usefixtures("room")
def test_different_means_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "ROWS", ((32, 1_000_000),))
    with pytest.raises(HanseError, match="not the same mean"):
        rows(1, fake([], TREE))


def test_what_does_not_fit_or_lasts_too_long_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aggregation, "ROWS", ((128, 25_000_000),))
    monkeypatch.setattr(aggregation, "free", lambda: (needs(IN_PLACE, 25_000_000)[0] - 1, 10**15))
    asked: list[str] = []
    table = rows(1, fake(asked, slow=ONE))
    assert IN_PLACE not in asked and {row["case"] for row in table} >= {LOCAL, TREE, LARGE}
    assert not {row["case"] for row in table} & {IN_PLACE, ONE} and not any("one" in row for row in table)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("hanse, in place, 128 updates of 25,000,000 numbers: left out: it takes 1.0 GB of shared memory")
    assert last.startswith("one aggregator, TCP, 128") and last.endswith("left out: it has taken more than 651 s")


def test_what_is_free_is_that_of_this_machine() -> None:
    shared, memory = free()
    assert shared > 0 and memory > 1e8
