"""What all traces share: from speeds on pieces of time to who is there, when work is done, and who is back when."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_traces import by_the_second, people, written

import hanse as hs
from hanse.fleet import Trace, always

SPEED = st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 2.0])
TABLE = st.integers(1, 40).flatmap(lambda n: st.lists(st.lists(SPEED, min_size=n, max_size=n), min_size=3, max_size=3))
EIGHTHS = st.integers(1, 200).map(lambda n: n / 8)
EVERYONE = torch.arange(3)


def seconds(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_everyone_is_always_there() -> None:
    trace = always()
    assert trace.online(people(3), EVERYONE, 5.0, 1).all() and not trace.counts_rounds
    at, broken = trace.finish(people(3), EVERYONE, seconds(0, 1, 2), seconds(5, 5, 5))
    assert at.tolist() == [5, 6, 7] and not broken.any()
    assert trace.back(people(3), EVERYONE, 4.0).tolist() == [4, 4, 4]
    assert trace.away(people(3), EVERYONE, 100.0).shape == (0, 3)


@given(TABLE, st.integers(1, 5), st.booleans(), st.lists(st.integers(0, 150), min_size=3, max_size=3), EIGHTHS)
def test_work_is_done_when_a_count_second_by_second_says(
    table: list[list[float]], slot: int, lost: bool, starts: list[int], work: float
) -> None:
    trace = written(table, slot=slot, lost=lost)
    at, broken = trace.finish(people(3), EVERYONE, seconds(*starts), seconds(work, work, work))
    for client, start in enumerate(starts):
        row = table[client]
        expected = by_the_second(lambda t, row=row: row[t // slot % len(row)], start, work, lost, horizon=40_000)
        assert (float(at[client]), bool(broken[client])) == expected


@given(TABLE, st.integers(1, 5), st.integers(0, 800))
def test_who_is_there_and_back_follow_the_levels(table: list[list[float]], slot: int, quarters: int) -> None:
    trace, now = written(table, slot=slot), quarters / 4
    there = [row[int(now // slot) % len(row)] > 0 for row in table]
    assert trace.online(people(3), EVERYONE, now, round=0).tolist() == there
    for back, row, online in zip(trace.back(people(3), EVERYONE, now).tolist(), table, there, strict=True):
        if online:
            assert back == now
        elif any(row):
            assert back % slot == 0 and row[int(back // slot) % len(row)] > 0
            assert not any(row[s % len(row)] for s in range(int(now // slot), int(back // slot)))
        else:
            assert back == math.inf


@given(TABLE, st.integers(1, 5), st.integers(1, 300))
def test_absences_are_the_slots_of_level_0_in_one_piece_each(table: list[list[float]], slot: int, until: int) -> None:
    absences = written(table, slot=slot).away(people(3), EVERYONE, float(until)).tolist()
    assert absences == sorted(absences)
    away = {(client, t) for client, row in enumerate(table) for t in range(until) if row[t // slot % len(row)] == 0}
    assert {(int(client), t) for client, begin, end in absences for t in range(int(begin), int(end))} == away
    ends = {(client, end) for client, _, end in absences}
    assert not any((client, begin) in ends for client, begin, _ in absences)


@given(TABLE, st.permutations(range(3)), st.integers(1, 3))
def test_a_client_fares_the_same_whoever_is_asked_with(table: list[list[float]], order: list[int], cut: int) -> None:
    trace, some = written(table, slot=2), torch.tensor(order)[:cut]
    start, work = seconds(0, 3, 11.5), seconds(4, 0.5, 40)
    everyone, few = trace.finish(people(3), EVERYONE, start, work), trace.finish(people(3), some, start[some], work[some])
    assert torch.equal(everyone.at[some], few.at) and torch.equal(everyone.broken[some], few.broken)
    assert torch.equal(trace.back(people(3), EVERYONE, 3.0)[some], trace.back(people(3), some, 3.0))


@pytest.mark.parametrize(("lost", "at", "broken"), [(False, 35, False), (True, 20, True)])
def test_work_goes_on_after_an_absence_or_is_lost(lost: bool, at: float, broken: bool) -> None:
    trace = written(((1, 1, 0, 1),), slot=10, lost=lost)
    found = trace.finish(people(1), torch.tensor([0]), seconds(5), seconds(20))
    assert (found.at.item(), found.broken.item()) == (at, broken)


def test_work_that_ends_as_the_client_leaves_is_not_lost() -> None:
    trace = written(((1, 0),), slot=10, lost=True)
    at, broken = trace.finish(people(1), torch.tensor([0, 0]), seconds(4, 4), seconds(6, 6.5))
    assert at.tolist() == [10, 10] and broken.tolist() == [False, True]
    sevenths = written(((1, 1, 1, 0),), slot=1 / 7, lost=True)
    at, broken = sevenths.finish(people(1), torch.tensor([0]), seconds(0), seconds(1 / 7 + 1 / 7 + 1 / 7))
    assert at.item() == pytest.approx(3 / 7) and not broken.item()


def test_work_of_no_length_is_done_at_once() -> None:
    at, broken = written(((0, 1),), slot=10, lost=True).finish(people(1), torch.tensor([0, 0]), seconds(4, 14), seconds(0, 0))
    assert at.tolist() == [4, 14] and not broken.any()


def test_work_that_never_begins_or_never_ends_is_never_done() -> None:
    trace = written(((1, 1), (0, 0)), slot=10)
    at, broken = trace.finish(people(2), torch.tensor([0, 1]), seconds(math.inf, 5), seconds(1, 1))
    assert at.tolist() == [math.inf, math.inf] and not broken.any()


@given(st.floats(1e-3, 1e4), st.integers(0, 10_000))
def test_a_client_is_there_at_the_very_moment_it_is_back(slot: float, turn: int) -> None:
    """Also when that moment has been rounded to whole nanoseconds, as virtual time is."""
    trace, who = written(((0, 1),), slot=slot), torch.tensor([0])
    back = float(trace.back(people(1), who, 2 * turn * slot + slot / 2))
    assert back == (2 * turn + 1) * slot
    for moment in (back, round(back * 1e9) / 1e9):
        assert trace.online(people(1), who, moment, 0).item()
        assert float(trace.back(people(1), who, moment)) == moment


def test_a_slot_without_a_length_is_a_round() -> None:
    trace = written(((1, 0, 1), (0, 1, 1)))
    assert trace.counts_rounds and not written(((1, 0),), slot=1).counts_rounds
    assert [trace.online(people(2), torch.arange(2), 1e6, round).tolist() for round in range(4)] == [
        [True, False],
        [False, True],
        [True, True],
        [True, False],
    ]
    at, broken = trace.finish(people(2), torch.arange(2), seconds(1, 2), seconds(50, 50))
    assert at.tolist() == [51, 52] and not broken.any()
    assert trace.back(people(2), torch.arange(2), 7.5).tolist() == [7.5, 7.5]
    assert trace.away(people(2), torch.arange(2), 5).tolist() == [[0, 1, 2], [0, 4, 5], [1, 0, 1], [1, 3, 4]]


@pytest.mark.parametrize("text", ["always", "bernoulli(0.5)", "markov(0.5, slot=3)", "recorded('nothing.csv')"])
def test_nobody_asked_about_is_no_trouble(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing.csv").write_text("client,time,online,speed\n")
    trace, none = Trace.parse(text), torch.arange(0)
    assert len(trace.online(people(3), none, 0.0, 0)) == len(trace.back(people(3), none, 0.0)) == 0
    assert len(trace.finish(people(3), none, seconds(), seconds()).at) == len(trace.away(people(3), none, 10)) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bernoulli(1.5)", "bernoulli.rate: 1.5 is not allowed: it has to be a probability, from 0 to 1"),
        ("bernoulli(0.5, slot=0)", "bernoulli.slot: 0 is not allowed"),
        ("bernoulli(0.5, lost=True)", "lost needs slots of so many seconds"),
        ("markov(0.5, on=0)", "markov.on: 0 is not allowed"),
        ("cyclic(0.5, period=1)", "cyclic.period: 1 is not allowed"),
        ("diurnal(day=100)", "slot has to be at most day"),
        ("crashes(0, 100)", "crashes.every: 0 is not allowed"),
        ("slowdowns(0.5, 0.5)", "slowdowns.factor: 0.5 is not allowed: it has to be finite and at least 1"),
        ("slowdowns(0.5, 2, lost=True)", "slowdowns.lost: True is not allowed"),
        ("written(((1,),))", "unknown name 'written'"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, said: str) -> None:
    with pytest.raises(hs.ConfigError, match=said):
        Trace.parse(text)
