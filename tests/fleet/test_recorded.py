"""Traces read from a file."""

import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_traces import by_the_second, people

import hanse as hs
from hanse.fleet import Trace, recorded

HEADER = "client,time,online,speed\n"
FIVE = """client,time,online,speed
3,10,0,0
0,0,0,1
0,20,1,0.5
3,30.5,1,2
0,30,1,1
"""
STEP = st.tuples(st.integers(1, 30), st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 2.0]))
RECORD = st.lists(STEP, max_size=12)


@pytest.fixture
def five(tmp_path: Path) -> recorded:
    (tmp_path / "five.csv").write_text(FIVE)
    return recorded(str(tmp_path / "five.csv"))


def seconds(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_rows_say_who_is_there_from_then_on(five: recorded) -> None:
    clients = torch.tensor([0, 1, 3])
    assert not five.counts_rounds
    there = {now: five.online(people(5), clients, now, round=0).tolist() for now in (0.0, 9.9, 10.0, 20.0, 30.4, 30.5, 1e9)}
    assert there == {
        0.0: [False, True, True],
        9.9: [False, True, True],
        10.0: [False, True, False],
        20.0: [True, True, False],
        30.4: [True, True, False],
        30.5: [True, True, True],
        1e9: [True, True, True],
    }
    assert five.back(people(5), clients, 12.0).tolist() == [20, 12, 30.5]


def test_work_goes_at_the_recorded_speeds(five: recorded) -> None:
    clients = torch.tensor([0, 0, 1, 3, 3])
    at, broken = five.finish(people(5), clients, seconds(0, 22, 5, 5, 0), seconds(4, 5, 100, 5.5, 4))
    assert at.tolist() == [28, 31, 105, 30.75, 4] and not broken.any()
    at, broken = recorded(five.file, lost=True).finish(people(5), clients, seconds(0, 22, 5, 5, 0), seconds(4, 5, 100, 5.5, 4))
    assert at.tolist() == [0, 31, 105, 10, 4] and broken.tolist() == [True, False, False, True, False]


def test_absences_are_those_of_the_file(five: recorded) -> None:
    assert five.away(people(5), torch.arange(5), 1000.0).tolist() == [[0, 0, 20], [3, 10, 30.5]]
    assert five.away(people(5), torch.tensor([3, 0]), 15.0).tolist() == [[3, 10, 15], [0, 0, 15]]


def test_the_last_row_holds_for_ever(tmp_path: Path) -> None:
    (tmp_path / "gone.csv").write_text(HEADER + "0,5,0,0\n0,8,0,0\n1,5,1,0.5\n")
    trace, clients = recorded(str(tmp_path / "gone.csv")), torch.tensor([0, 1, 2])
    assert trace.back(people(3), clients, 6.0).tolist() == [math.inf, 6, 6]
    assert trace.finish(people(3), clients, seconds(0, 0, 0), seconds(6, 6, 6)).at.tolist() == [math.inf, 7, 6]
    assert trace.away(people(3), clients, 100.0).tolist() == [[0, 5, 100]]


@given(st.lists(RECORD, min_size=3, max_size=3), st.booleans(), st.integers(0, 200), st.integers(1, 400).map(lambda n: n / 8))
def test_work_is_done_when_a_count_second_by_second_says(
    records: list[list[tuple[int, float]]], lost: bool, start: int, work: float
) -> None:
    speeds = []
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for client, record in enumerate(records):
            time, line = 0, [1.0] * 600
            for gap, speed in record:
                time += gap
                line[time:] = [speed] * (600 - time)
                lines.append(f"{client},{time},{int(speed > 0)},{speed}\n")
            speeds.append(line)
        Path(folder, "made.csv").write_text(HEADER + "".join(lines))
        trace = recorded(f"{folder}/made.csv", lost=lost)
        at, broken = trace.finish(
            people(3), torch.arange(3), torch.full((3,), float(start)).double(), torch.full((3,), work).double()
        )
        online = trace.online(people(3), torch.arange(3), float(start), 0)
        away = {(int(c), t) for c, begin, end in trace.away(people(3), torch.arange(3), 600.0) for t in range(int(begin), int(end))}
    for client, line in enumerate(speeds):
        expected = by_the_second(lambda t, line=line: line[min(t, 599)], start, work, lost, horizon=2000)
        assert (at[client].item(), broken[client].item()) == expected
        assert online[client].item() == (line[start] > 0)
        assert {t for c, t in away if c == client} == {t for t in range(600) if line[t] == 0}


def test_many_clients_of_a_large_file_are_found(tmp_path: Path) -> None:
    rows = "".join(f"{client},{10 * k},{k % 2},{client + 1}\n" for k in range(1, 9) for client in range(0, 200, 2))
    (tmp_path / "large.csv").write_text(HEADER + rows)
    trace = recorded(str(tmp_path / "large.csv"))
    for k in range(9):
        there = trace.online(people(201), torch.arange(201), 10.0 * k + 5, 0)
        assert there.tolist() == [client % 2 == 1 or client == 200 or k % 2 == 1 or k == 0 for client in range(201)]


def test_a_file_is_read_once_unless_it_changes(five: recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    assert five.back(people(5), torch.tensor([0]), 0.0).item() == 20
    Path(five.file).write_text(HEADER + "0,0,0,1\n0,50,1,1\n")
    os.utime(five.file, ns=(0, 0))
    assert five.back(people(5), torch.tensor([0]), 0.0).item() == 50
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", None)
        assert five.back(people(5), torch.tensor([0]), 0.0).item() == 50


def test_writing_it_down_and_reading_it_back_changes_nothing(five: recorded) -> None:
    assert Trace.parse(str(five)) == five == Trace.parse(five.full())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: the header has to be client,time,online,speed"),
        ("client,time,online\n0,1,1\n", "line 1: the header"),
        (HEADER + "0,1,1,1\n0,1,1\n", "line 3: '0,1,1' is not client,time,online,speed in numbers"),
        (HEADER + "0,1,1,fast\n", "line 2: '0,1,1,fast' is not"),
        (HEADER + "0.5,1,1,1\n", "line 2: '0.5,1,1,1' is not"),
        (HEADER + "\n", "line 2: '' is not"),
        (HEADER + "-1,1,1,1\n", "line 2: client -1 at 1 s is not allowed"),
        (HEADER + "0,-1,1,1\n", "line 2: client 0 at -1 s is not allowed"),
        (HEADER + "0,nan,1,1\n", "line 2: client 0 at nan s is not allowed"),
        (HEADER + "0,5,1,1\n1,1,1,1\n0,5,0,0\n", "line 4: 5 s of client 0 is not after 5 s"),
        (HEADER + "0,1,yes,1\n", "line 2: online 'yes' is not allowed: it has to be 0 or 1"),
        (HEADER + "0,1,1,0\n", "line 2: speed 0 is not allowed: it has to be positive where online is 1"),
        (HEADER + "0,1,1,inf\n", "line 2: speed inf is not allowed"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(hs.DataError, match=rf"bad\.csv, {said}"):
        recorded(str(tmp_path / "bad.csv")).online(people(1), torch.tensor([0]), 0.0, 0)


@pytest.mark.parametrize("content", [None, b"client,time,online,speed\n\xff\xfe,1,1,1\n"])
def test_a_file_that_is_no_text_or_is_not_there_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(hs.DataError, match=r"bad\.csv: cannot be read"):
        recorded(str(tmp_path / "bad.csv")).online(people(1), torch.tensor([0]), 0.0, 0)
