"""What gossip is timed against, and the table."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hanse.bench import gossip
from hanse.topologies import Topology


def test_every_case_is_timed_beside_a_copy_and_the_dense_product() -> None:
    for name in gossip.CASES:
        found = gossip.measure(name, nodes=16, size=100, repeats=1)
        assert (found["case"], found["nodes"], found["size"]) == (name, 16, 100)
        assert min(found[key] for key in gossip.TIMES) > 0


def test_the_table_has_the_best_of_all_repetitions() -> None:
    asked: list[str] = []

    def one(command: list[str]) -> dict[str, Any]:
        name = json.loads(command[-1])["name"]
        asked.append(name)
        first = len(asked) <= len(gossip.CASES)
        times = {"seconds": 2.0 if first else 3.0, "copy_s": 4.0 if first else 1.0, "dense_s": 8.0}
        return {"case": name, "nodes": 10, "size": 10, **times}

    table = gossip.rows(2, one)
    assert asked == [*gossip.CASES, *gossip.CASES] and [row["case"] for row in table] == list(gossip.CASES)
    assert all((row["of_copy"], row["of_dense"]) == pytest.approx((2, 0.25)) for row in table)


def test_all_cases_are_topologies() -> None:
    assert all(str(Topology.parse(text)) for text in gossip.CASES)
