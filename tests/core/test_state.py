"""What clients keep: rows made on first use, in memory or in a file."""

import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanse.core.errors import CheckpointError
from hanse.core.state import ClientState

WIDTHS = {"c": 3, "private": 2}
START = {"private": torch.tensor([5.0, 6.0])}


def rows(*values: float) -> dict[str, torch.Tensor]:
    return {n: torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, w).clone() for n, w in WIDTHS.items()}


@pytest.fixture(params=["memory", "file"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> ClientState:
    return ClientState(10, WIDTHS, initial=START, folder=tmp_path if request.param == "file" else None)


def test_a_row_not_yet_written_reads_as_its_start(state: ClientState) -> None:
    state.write(torch.tensor([7, 2]), rows(1, 2))
    read = state.read(torch.tensor([2, 3, 7]))
    assert torch.equal(read["c"], torch.tensor([[2.0] * 3, [0.0] * 3, [1.0] * 3]))
    assert torch.equal(read["private"], torch.tensor([[2.0] * 2, [5.0, 6.0], [1.0] * 2]))
    assert torch.equal(state.read(torch.tensor([0]))["private"], torch.tensor([[5.0, 6.0]]))


def test_rows_may_start_out_different() -> None:
    start = torch.arange(10.0)[:, None]
    state = ClientState(10, {"p": 1}, initial={"p": start})
    assert torch.equal(state.read(torch.tensor([4, 2]))["p"], start[[4, 2]])
    state.write(torch.tensor([2]), {"p": torch.tensor([[9.5]])})
    read = state.read(torch.tensor([4, 2, 7]))["p"]
    assert torch.equal(read, torch.tensor([[4.0], [9.5], [7.0]]))
    read.add_(1)
    assert torch.equal(start[7], torch.tensor([7.0]))


def test_reading_gives_a_copy(state: ClientState) -> None:
    state.write(torch.tensor([1]), rows(1))
    for ids in ([1], [1, 4], [4]):
        before = state.read(torch.tensor(ids))
        for values in state.read(torch.tensor(ids)).values():
            values.add_(9)
        assert all(torch.equal(before[n], v) for n, v in state.read(torch.tensor(ids)).items())


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, unique=True), st.integers(-9, 9)), max_size=8))
def test_memory_and_file_equal_a_plain_table(writes: list[tuple[list[int], int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        kinds = [ClientState(10, WIDTHS, initial=START), ClientState(10, WIDTHS, initial=START, folder=Path(folder))]
        table = {n: torch.zeros(10, w) for n, w in WIDTHS.items()}
        table["private"] += START["private"]
        for ids, value in writes:
            new = rows(*(value + i for i in range(len(ids))))
            for n, v in new.items():
                table[n][ids] = v
            for state in kinds:
                state.write(torch.tensor(ids), new)
        for state in kinds:
            for n, v in state.read(torch.arange(10)).items():
                assert torch.equal(v, table[n])
        assert all(torch.equal(v, kinds[1].snapshot()[n]) for n, v in kinds[0].snapshot().items())


def test_a_million_clients_cost_four_bytes_each() -> None:
    tracemalloc.start()
    state = ClientState(1_000_000, {"c": 10_000})
    ids = torch.tensor([3, 500_000, 999_999])
    state.write(ids, {"c": torch.ones(3, 10_000)})
    tracemalloc.stop()
    assert state.slot.nbytes == 4_000_000 and state.rows["c"].nbytes <= 6 * 40_000
    assert torch.equal(state.read(torch.tensor([4, 999_999]))["c"].sum(1), torch.tensor([0.0, 10_000.0]))
    assert sum(t.nbytes for t in state.snapshot().values()) == 3 * 40_000 + 3 * 8


def test_the_file_is_on_disk_and_old_ones_go(tmp_path: Path) -> None:
    state = ClientState(100, {"c": 4}, folder=tmp_path)
    for i in range(20):
        state.write(torch.tensor([i]), {"c": torch.full((1, 4), float(i))})
    assert [f.name for f in tmp_path.iterdir()] == [f"c.{len(state.rows['c'])}.rows"]
    assert next(tmp_path.iterdir()).stat().st_size == len(state.rows["c"]) * 16


def test_a_snapshot_brings_everything_back(state: ClientState) -> None:
    state.write(torch.tensor([8, 1, 4]), rows(1, 2, 3))
    saved = state.snapshot()
    expected = state.read(torch.arange(10))
    state.write(torch.tensor([4, 1]), rows(9, 9))  # must not reach what was saved
    for other in (state, ClientState(10, WIDTHS, initial=START)):
        other.restore(saved)
        assert all(torch.equal(v, expected[n]) for n, v in other.read(torch.arange(10)).items())
        assert all(torch.equal(v, saved[n]) for n, v in other.snapshot().items())


@pytest.mark.parametrize(
    "change",
    [
        {"c": None},
        {"owners": None},
        {"c": torch.zeros(1, 4)},
        {"owners": torch.tensor([11])},
        {"owners": torch.tensor([-1])},
        {"owners": torch.zeros(2).long()},
        {"owners": torch.zeros(1)},
    ],
    ids=[
        "rows missing",
        "owners missing",
        "other width",
        "no such client",
        "negative client",
        "two owners of one row",
        "fractions",
    ],
)
def test_a_snapshot_of_something_else_is_refused(change: dict[str, torch.Tensor | None]) -> None:
    state = ClientState(10, WIDTHS)
    state.write(torch.tensor([5]), rows(1))
    saved = {n: t for n, t in (state.snapshot() | change).items() if t is not None}
    with pytest.raises(CheckpointError, match="client state"):
        ClientState(10, WIDTHS).restore(saved)


def test_nothing_kept_costs_nothing() -> None:
    state = ClientState(10, {})
    assert state.snapshot() == {} and state.read(torch.arange(3)) == {}
    state.restore({})
