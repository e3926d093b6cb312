"""Placement, trees and scaling, as properties."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.hierarchy.plan import OUT, Role, best_fit, choose, leaves, round_robin, smoothed, top, transfers, tree

loads = st.lists(st.tuples(st.integers(0, 20), st.floats(0, 25)), min_size=1, max_size=8)


@given(nodes=loads, updates=st.integers(0, 200))
def test_best_fit_never_exceeds_the_capacity_but_by_those_that_queue(nodes: list[tuple[int, float]], updates: int) -> None:
    capacity, queued = [n[0] for n in nodes], [n[1] for n in nodes]
    placed, waiting = best_fit(capacity, queued, updates)
    assert len(placed) == updates
    counts = Counter(placed[: updates - waiting])
    assert all(queued[i] + n <= capacity[i] for i, n in counts.items())
    if waiting:  # no node has room for one more; they all queue where most is left
        left = [c - q - counts[i] for i, (c, q) in enumerate(zip(capacity, queued, strict=True))]
        assert max(left) < 1
        assert {left[i] for i in placed[updates - waiting :]} == {max(left)}


@given(nodes=st.integers(1, 8), capacity=st.integers(1, 20), share=st.floats(0, 1))
def test_equal_nodes_are_filled_one_after_the_other(nodes: int, capacity: int, share: float) -> None:
    updates = int(share * nodes * capacity)
    placed, waiting = best_fit([capacity] * nodes, [0] * nodes, updates)
    assert waiting == 0 and len(set(placed)) == math.ceil(updates / capacity)
    assert transfers(placed) <= transfers(round_robin(nodes, updates))


def test_best_fit_takes_the_fullest_node_that_has_room() -> None:
    assert best_fit([10, 10, 10], [0, 7.5, 9.5], 5) == ([1, 1, 0, 0, 0], 0)
    assert best_fit([2, 2], [2, 1.5], 3) == ([1, 1, 1], 3)
    assert round_robin(3, 5) == [0, 1, 2, 0, 1]


def test_results_travel_to_the_node_with_most_updates() -> None:
    assert top([0, 1, 1, 2]) == 1 and top([2, 0, 0, 2]) == 0
    assert [transfers(n) for n in ([], [1, 1], [0, 1, 2])] == [0, 0, 2]


@given(updates=st.integers(0, 300), fan_in=st.integers(2, 9), lanes=st.integers(1, 9))
def test_a_tree_takes_every_update_once_and_ends_in_one_result(updates: int, fan_in: int, lanes: int) -> None:
    steps, places = tree(updates, fan_in, lanes)
    slots = [*places, *((s.parent, s.slot) for s in steps if s.parent != OUT)]
    assert sorted(slots) == [(i, slot) for i, s in enumerate(steps) for slot in range(s.inputs)]
    assert [s.parent for s in steps].count(OUT) == (updates > 0)
    assert all(s.parent == OUT or s.parent > i for i, s in enumerate(steps))
    assert len(places) == updates
    assert sum(s.role is Role.LEAF for s in steps) == leaves(updates, fan_in) == math.ceil(updates / fan_in)
    assert sum(s.role is Role.MIDDLE for s in steps) == (min(lanes, leaves(updates, fan_in)) > 1)
    # Memory: a leaf's step has its last result and at most fan_in updates, so nothing grows with the number of updates.
    assert all(s.inputs <= (fan_in + 1 if s.role is Role.LEAF else lanes) for s in steps)


def test_the_queue_estimate_starts_with_the_first_measurement() -> None:
    assert smoothed(None, 10, 0.5) == 5
    assert smoothed(5, 20, 0.5) == pytest.approx(0.7 * 10 + 0.3 * 5)


def test_an_idle_aggregator_is_taken_and_promoted_rather_than_a_new_one_started() -> None:
    assert choose([], Role.LEAF) is None
    assert choose([Role.MIDDLE, Role.LEAF], Role.LEAF) == 1
    assert choose([Role.LEAF, Role.MIDDLE], Role.TOP) == 1
    assert choose([Role.LEAF], Role.MIDDLE) == 0
    assert choose([Role.TOP], Role.LEAF) == 0
