"""What the experiment on hierarchical aggregation measures with."""

from __future__ import annotations

import pytest
import torch

from hanse.hierarchy.service import Aggregation
from hanse.reproduce import lifl
from hanse.reproduce.lifl import ALWAYS, BEST, TURN


def test_placement_by_hand() -> None:
    found = lifl.simulate(3)
    assert found.updates == [lifl.load(t) for t in range(3)]
    nodes = -(-found.updates[0] // lifl.CAPACITY)
    assert found.sent[BEST][1] == (nodes - 1) * lifl.MODEL and found.sent[TURN][1] == 3 * lifl.MODEL
    work = found.updates[0] * lifl.EACH
    assert found.seconds[BEST][1] == pytest.approx(work + nodes * lifl.IDLE)
    assert found.seconds[TURN][1] == pytest.approx(work + 4 * lifl.IDLE)
    assert found.seconds[ALWAYS][1:] == [80, 160, 240]


def test_the_load_varies_and_stays_below_half() -> None:
    updates = [lifl.load(t) for t in range(lifl.ROUNDS)]
    assert min(updates) < 12 and max(updates) > 36
    assert sum(updates) < 0.5 * lifl.ROUNDS * lifl.NODES * lifl.CAPACITY


def test_a_staggered_round_lasts_as_long_as_its_updates_take_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifl, "SIZE", 1000)
    with Aggregation(1000, workers=1) as service:
        seconds, after = lifl.staggered(service, torch.ones(1000))
    assert seconds >= 15 * lifl.GAP + after and after > 0
    monkeypatch.setattr(lifl, "REPEATS", 1)
    assert set(lifl.waits()) == {"eager", "lazy"}
