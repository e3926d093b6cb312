"""What aggregators are compared with, and the table."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hanse.aggregators import Aggregator
from hanse.bench import aggregators


@pytest.mark.parametrize("name", aggregators.RULES)
def test_every_rule_is_timed_beside_the_mean(name: str) -> None:
    found = aggregators.measure(name, 43, 1000, repeats=1)
    assert found["ratio"] == found["seconds"] / found["mean_s"] > 0
    if aggregators.RULES[name] and aggregators.byzfl():
        assert found["byzfl_ratio"] > 0 and found["byzfl_columns"] == 1000


def test_the_table_has_the_least_ratio_and_asks_the_peer_once() -> None:
    asked: list[dict[str, Any]] = []

    def one(command: list[str]) -> dict[str, Any]:
        spec = json.loads(command[-1])
        asked.append(spec)
        ratio = 3.0 if len(asked) <= len(aggregators.RULES) else 2.0
        return {"case": spec["name"], "seconds": ratio, "mean_s": 1.0, "ratio": ratio, **({"byzfl_s": 9.0} if spec["peer"] else {})}

    table = aggregators.rows(2, one, columns=2000)
    assert [row["case"] for row in table] == list(aggregators.RULES) and len(asked) == 2 * len(table)
    assert all(row["ratio"] == 2 and row["byzfl_s"] == 9 for row in table)
    assert [spec["peer"] for spec in asked] == [True] * len(table) + [False] * len(table)


def test_all_rules_are_aggregators() -> None:
    assert all(str(Aggregator.parse(text)) for text in aggregators.RULES)
