"""Views that nodes merge, and the order in which a round asks: no messages, no time."""

from __future__ import annotations

import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from hanse.schedules.membership import JOIN, LEAVE, View, digest

entries = st.tuples(st.integers(0, 5), st.integers(0, 100), st.integers(0, 4), st.sampled_from([JOIN, LEAVE]))
views = st.lists(entries, max_size=6, unique_by=lambda entry: entry[0]).map(
    lambda rows: View(torch.tensor(sorted(rows), dtype=torch.int64).reshape(-1, 4))
)


def same(one: View, other: View) -> bool:
    return torch.equal(one.rows, other.rows)


@given(views, views, views)
def test_merging_is_commutative_associative_and_idempotent(a: View, b: View, c: View) -> None:
    assert same(a.merge(b), b.merge(a))
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same(a.merge(a), a)
    assert same(a.merge(b).merge(b), a.merge(b))


@given(views, views)
def test_merging_forgets_nobody_and_nothing_goes_back(a: View, b: View) -> None:
    merged = a.merge(b)
    assert merged.known == sorted({*a.known, *b.known})
    for view in (a, b):
        for node in view.known:
            (last, counter, event), (now, count, what) = view.of(node), merged.of(node)
            assert now >= last and count >= counter
            assert count > counter or event == what or what == LEAVE


def test_the_event_of_the_larger_counter_wins_whichever_round_it_is_of() -> None:
    old, new = View.entry(3, 90, 4, LEAVE), View.entry(3, 10, 5, JOIN)
    assert old.merge(new).of(3) == (90, 5, JOIN)
    assert View.entry(3, 10, 5, JOIN).merge(View.entry(3, 10, 5, LEAVE)).of(3) == (10, 5, LEAVE)
    assert View.everyone(2).merge(new).rows.tolist() == [[0, 0, 1, JOIN], [1, 0, 1, JOIN], [3, 10, 5, JOIN]]


def test_what_is_known_of_whom() -> None:
    view = View.everyone(3).merge(View.entry(1, 7, 2, LEAVE))
    assert (view.of(1), view.of(9), view.latest, view.known) == ((7, 2, LEAVE), None, 7, [0, 1, 2])
    assert View.everyone(0).latest == 0 and View.everyone(0).known == []
    assert view.rows.shape == (3, 4) and view.rows.dtype == torch.int64


def test_who_has_left_or_was_silent_for_too_long_is_in_no_order_but_a_node_counts_itself() -> None:
    view = View.everyone(4).merge(View.entry(1, 60, 2, LEAVE)).merge(View.entry(2, 60, 1))
    assert sorted(view.order(50, me=0, inactive=50)) == [0, 2, 3]
    assert sorted(view.order(51, me=0, inactive=50)) == [0, 2]
    assert sorted(view.order(51, me=1, inactive=50)) == [1, 2]
    assert sorted(view.order(51, me=9, inactive=50)) == [2, 9]


def test_once_all_views_have_merged_nobody_samples_a_node_that_has_left() -> None:
    nodes = [View.everyone(12) for _ in range(12)]
    nodes[3] = nodes[3].merge(View.entry(7, 5, 2, LEAVE))
    for i in (*range(12), *range(12)):  # along a ring, twice
        nodes[(i + 1) % 12] = nodes[(i + 1) % 12].merge(nodes[i])
    for k in range(100):
        orders = {tuple(view.order(k, me=0, inactive=50)) for view in nodes}
        assert len(orders) == 1 and 7 not in orders.pop()


@given(views, views, st.integers(0, 100))
def test_nodes_with_equal_views_have_equal_orders(a: View, b: View, k: int) -> None:
    me = 0
    assert a.merge(b).order(k, me, 50) == b.merge(a).order(k, me, 50)


def test_all_nodes_are_sampled_equally_often() -> None:
    n, s, rounds = 50, 10, 2000
    view, times = View.everyone(n), torch.zeros(n)
    for k in range(1, rounds + 1):
        times[view.order(k, me=0, inactive=rounds)[:s]] += 1
    sigma = (rounds * s / n * (1 - s / n)) ** 0.5
    assert int(times.sum()) == rounds * s
    assert float((times - rounds * s / n).abs().max()) < 5 * sigma
    assert float(times.std()) > sigma / 2  # and by chance


def test_the_order_is_that_of_a_digest_which_is_the_same_everywhere() -> None:
    """Python's own hash is another in every process."""
    assert digest(3, 17).hex() == hashlib.sha256(b"3-17").hexdigest()[:32] == "bd7169096040433ae23e86c6d4451eec"
    assert View.everyone(9).order(17, 0, 50) == [8, 7, 4, 6, 2, 1, 3, 0, 5]
