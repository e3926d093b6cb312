"""Run folders: what is in them survives a cut at any byte, and what is wrong with them is one line."""

import json
import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import made_runs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanse.core.errors import CheckpointError
from hanse.track.folder import CHECKPOINT, CLIENTS, HISTORY, SETTINGS, Folder, worst_share
from hanse.track.run import Run


def whole() -> Run:
    run = made_runs.run(task="digits")
    run.weights, run.names, run.notes = {"w": torch.arange(6.0).view(2, 3)}, ("0", "ä"), {"a": "b"}
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "a" / "run")
    made.write(whole())
    return made


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Files cannot grow beyond ``limit`` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_reads_back(folder: Folder) -> None:
    run, back = whole(), folder.read()
    for name in ("method", "seed", "settings", "history", "names", "notes"):
        assert getattr(back, name) == getattr(run, name)
    for name in ("weights", "clients"):
        ours, theirs = getattr(back, name), getattr(run, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_what_privacy_has_cost_is_read_back_where_it_was_written(folder: Folder) -> None:
    run = whole()
    run.history = [{**run.history[0], "epsilon": math.inf}, {**run.history[1], "epsilon": 0.5}, run.history[2]]
    folder.write(run)
    assert folder.read().history == run.history


def test_writing_again_leaves_nothing_of_the_run_before(folder: Folder) -> None:
    folder.write(made_runs.run("FedProx", accuracies=()))
    back = folder.read()
    assert back.method == "FedProx" and back.history == [] and back.weights == {}


@given(st.integers(0, 10**6))
def test_a_history_cut_at_any_byte_keeps_its_whole_lines(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    made = Folder(tmp_path_factory.mktemp("run"))
    records = [made_runs.record(t, accuracy=0.1 * t) for t in range(1, 5)]
    for one in records:
        made.append(one)
    data = (made.path / HISTORY).read_bytes()
    assert made.history() == records
    cut %= len(data) + 1
    (made.path / HISTORY).write_bytes(data[:cut])
    lines = data[:cut].count(b"\n")
    assert made.history() == records[:lines]
    assert made.rewind(2) == records[: min(2, lines)] == made.history()
    made.append(records[2])
    assert made.history() == [*records[: min(2, lines)], records[2]]


def test_rounds_without_a_number_survive(folder: Folder) -> None:
    folder.append(made_runs.record(4, loss=math.nan))
    assert math.isnan(folder.history()[-1]["loss"])


def test_no_temporary_files_stay(folder: Folder) -> None:
    assert {f.name for f in folder.path.iterdir()} == {SETTINGS, HISTORY, CHECKPOINT, CLIENTS}


def test_a_full_disk_keeps_the_last_good_checkpoint(folder: Folder) -> None:
    before = (folder.path / CHECKPOINT).read_bytes()
    with (
        small_files(1000),
        pytest.raises(CheckpointError, match=r"checkpoint.safetensors cannot be written: File too large") as caught,
    ):
        folder.save({"w": torch.zeros(1000)})
    assert "\n" not in str(caught.value)
    assert (folder.path / CHECKPOINT).read_bytes() == before
    assert not list(folder.path.glob(".*"))
    with (
        small_files((folder.path / HISTORY).stat().st_size + 10),
        pytest.raises(CheckpointError, match=r"history.jsonl cannot be written"),
    ):
        folder.append(made_runs.record(4))
    assert len(folder.history()) == 3


@pytest.mark.parametrize(
    "write",
    [lambda f: f.write(whole()), lambda f: f.describe(whole()), lambda f: f.append(made_runs.record(1)), lambda f: f.save({})],
    ids=["write", "describe", "append", "save"],
)
def test_a_folder_that_cannot_be_written(tmp_path: Path, write: Callable[[Folder], None]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        write(Folder(tmp_path / "file" / "run"))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "checkpoint cut short": lambda p: cut_short(p / CHECKPOINT),
    "checkpoint empty": lambda p: (p / CHECKPOINT).write_bytes(b""),
    "checkpoint a pickle": lambda p: torch.save({"w": torch.zeros(2)}, p / CHECKPOINT),
    "checkpoint of a type unknown here": lambda p: (p / CHECKPOINT).write_bytes(
        (header := json.dumps({"x": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode())
        and len(header).to_bytes(8, "little") + header + b"0"
    ),
    "checkpoint a folder": lambda p: ((p / CHECKPOINT).unlink(), (p / CHECKPOINT).mkdir()),
    "clients cut short": lambda p: cut_short(p / CLIENTS),
    "settings missing": lambda p: (p / SETTINGS).unlink(),
    "settings cut short": lambda p: cut_short(p / SETTINGS),
    "settings not text": lambda p: (p / SETTINGS).write_bytes(b"\xff\xfe"),
    "settings a list": lambda p: (p / SETTINGS).write_text("[]"),
    "settings of something else": lambda p: (p / SETTINGS).write_text('{"settings": {}}'),
    "history of something else": lambda p: (p / HISTORY).write_text("hello\nworld\n"),
    "history not text": lambda p: (p / HISTORY).write_bytes(b"\xff\xfe\n"),
    "history of numbers": lambda p: (p / HISTORY).write_text("1\n2\n"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_line_that_names_the_file(folder: Folder, what: str) -> None:
    DAMAGE[what](folder.path)
    with pytest.raises(CheckpointError, match=str(folder.path)) as caught:
        folder.read()
    assert "\n" not in str(caught.value)


def test_a_folder_without_anything_yet(tmp_path: Path) -> None:
    assert Folder(tmp_path).history() == [] and Folder(tmp_path).load() is None
    with pytest.raises(CheckpointError, match="is not a run folder"):
        Folder(tmp_path / "none").read()


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.5], 0.5), ([3.0, 1.0, 2.0], 1.0), ([float(i) for i in range(30)], 1.0), ([math.nan, 4.0, 5.0], 4.0)],
)
def test_worst_share(values: list[float], expected: float) -> None:
    assert worst_share(torch.tensor(values)) == expected
    assert math.isnan(worst_share(torch.tensor([math.nan])))
