"""Where a run is: true while it goes on, after it ended, and after it died."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import hanse, refused
from hypothesis import given
from hypothesis import strategies as st
from small_runs import stop_after

import hanse as hs
from hanse.config import Settings
from hanse.core.errors import CheckpointError, DivergedError
from hanse.study import Study
from hanse.track import status
from hanse.track.folder import STATUS, Folder
from hanse.track.logs import logged
from hanse.track.run import Record
from hanse.track.status import FIELDS, Phases, Status, born, in_words, status_of

HERE: dict[str, Any] = {"path": "stacked", "chunk": 3, "workers": 1, "threads": 1}


def go(out: Path, **how: Any) -> hs.Run:
    federation = hs.Federation(hs.tasks.digits(hidden=4), clients=6)
    engine = hs.engines.local(**HERE)
    how = {"rounds": 3, "evaluate": 0, **how}
    return hs.run(
        federation, how.pop("method", hs.methods.FedAvg()), hs.schedules.synchronous(cohort=3), engine=engine, out=out, **how
    )


class Silent:
    """A display that shows nothing."""

    def write(self, record: Record) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("status") / "run"
    go(folder)
    return folder


def changed(finished: Path, folder: Path, **values: Any) -> Path:
    """A copy of a finished run's status in which some fields are different."""
    folder.mkdir(exist_ok=True)
    found = json.loads((finished / STATUS).read_bytes()) | values
    (folder / STATUS).write_text(json.dumps(found))
    return folder


def test_a_finished_run_says_so(finished: Path) -> None:
    found, last = status_of(finished, time.time()), Folder(finished).history()[-1]
    assert found.keys() == FIELDS.keys()
    assert (found["state"], found["round"], found["rounds"], found["clients"]) == ("finished", 3, 3, [])
    assert (found["bytes_down"], found["bytes_up"]) == (last["bytes_down"], last["bytes_up"])
    assert found["failures"] == {"lost": 0, "late": 0, "replaced": 0}
    assert all(seconds > 0 for seconds in found["spent"].values())
    assert in_words(finished, found, time.time()).startswith(f"{finished}: finished\n  round 3 of 3; ")


def test_a_stopped_run_says_how_to_go_on_and_then_finishes(tmp_path: Path) -> None:
    go(tmp_path, on_start=stop_after(2))
    found = status_of(tmp_path, time.time())
    assert (found["state"], found["round"]) == ("stopped", 2)
    assert f"stopped after round 2; go on with: hanse resume {tmp_path}\n" in in_words(tmp_path, found, time.time())
    hs.resume(tmp_path)
    assert status_of(tmp_path, time.time())["state"] == "finished"


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as raised:
        go(tmp_path, method=hs.methods.FedAvg(lr=1e30), rounds=9)
    found = status_of(tmp_path, time.time())
    assert (found["state"], found["why"]) == ("failed", str(raised.value))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_told_to_end_at_once_has_stopped(kind: type[BaseException], tmp_path: Path) -> None:
    def end(net: Any) -> None:
        raise kind

    with pytest.raises(kind):
        go(tmp_path, on_start=lambda net: setattr(net, "on_phase", end))
    assert status_of(tmp_path, time.time())["state"] == "stopped"


def test_a_run_that_is_killed_has_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[1] / "killed_run.py"
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run"), "9"], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while not (tmp_path / "run" / STATUS).exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert hanse(capsys, "status", tmp_path / "run").out.startswith(f"{tmp_path / 'run'}: running, ")
    process.send_signal(signal.SIGKILL)
    process.wait()
    outcome = hanse(capsys, "status", tmp_path / "run")
    assert f"process {process.pid} on " in outcome.out and f"is gone; go on with: hanse resume {tmp_path / 'run'}" in outcome.out
    assert outcome.status == 0


def test_a_later_process_of_the_same_number_is_another_one(finished: Path, tmp_path: Path) -> None:
    mine = {"state": "running", "process": os.getpid()}
    assert status_of(changed(finished, tmp_path, **mine, born=born(os.getpid())), 0.0)["state"] == "running"
    assert status_of(changed(finished, tmp_path, **mine, born="another"), 0.0)["state"] == "died"


def test_of_another_machine_only_fresh_news_count(finished: Path, tmp_path: Path) -> None:
    folder = changed(finished, tmp_path, state="running", host="elsewhere", written=1000.0, process=1)
    assert status_of(folder, 1030.0)["state"] == "running"
    found = status_of(folder, 1300.0)
    assert found["state"] == "silent"
    assert "nothing written for 5 min; look on elsewhere whether process 1 is alive" in in_words(folder, found, 1300.0)


def test_a_deployed_run_that_died_goes_on_with_flower(finished: Path, tmp_path: Path) -> None:
    clients = [{"name": "ada", "state": "refused", "since": 940.0, "why": "its disk is full"}]
    clients += [{"name": "bob", "state": "work", "since": 990.0, "why": "train for round 3"}]
    about = {"state": "running", "born": "gone", "engine": "flower", "clients": clients, "failures": {"refused": 2, "lost": 0}}
    folder = changed(finished, tmp_path, **about)
    words = in_words(folder, status_of(folder, 1000.0), 1000.0)
    assert "go on with: flwr run, with the same app" in words and "failures: 2 refused\n" in words
    assert "clients: 1 refused, 1 work\n    ada  refused     60 s  its disk is full\n" in words


def test_it_stays_fresh_and_follows_what_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "PAUSE", 0.01)
    monkeypatch.setattr(status, "BEAT", 0.02)
    told: dict[str, Any] = {"round": 1}
    keeper = Status(Folder(tmp_path), lambda: {**told})

    def file() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / STATUS).read_bytes())
        return found

    def wait(true: Any) -> None:
        end = time.monotonic() + 10
        while not true():
            assert time.monotonic() < end
            time.sleep(0.005)

    first = file()["written"]
    wait(lambda: file()["written"] > first)
    told["round"] = 2
    wait(lambda: file()["round"] == 2)
    keeper.end("failed", "why not")
    assert (file()["state"], file()["why"], file()["process"]) == ("failed", "why not", os.getpid())


def test_what_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / STATUS).mkdir()
    Status(Folder(tmp_path), dict).end("finished")
    assert "status.json cannot be written" in caplog.text


@given(st.binary() | st.recursive(st.none() | st.text() | st.floats(), st.lists).map(lambda made: json.dumps(made).encode()))
def test_a_damaged_file_is_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / STATUS).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{STATUS} is damaged"):
        status_of(folder, 0.0)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_to_be_there(name: str, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"is damaged: {name} is None"):
        status_of(changed(finished, tmp_path, **{name: None}), 0.0)


def test_all_runs_of_a_study_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small: dict[str, Any] = {
        "task": "digits(hidden=4)",
        "clients": 6,
        "cohort": 3,
        "rounds": 2,
        "engine": 'local("stacked", 3, 1, 1)',
    }
    study = Study(Settings(**small, seed=(0, 1)), tmp_path / "study")
    study.run()
    study._prepare(resume=False)
    study._run_one(next(study.cells()), False, Silent())
    outcome = hanse(capsys, "status", tmp_path / "study")
    assert f"{tmp_path / 'study' / 'fedavg-seed0'}: finished\n" in outcome.out
    assert outcome.out.endswith(f"{tmp_path / 'study' / 'fedavg-seed1'}: not begun\n1 finished and 1 not begun\n")
    told = json.loads(hanse(capsys, "status", tmp_path / "study", "--json").out)
    assert [one["state"] for one in told] == ["finished", "not begun"]


def test_a_run_without_a_status_says_how_far_it_is(finished: Path, tmp_path: Path) -> None:
    Folder(tmp_path / "copy").write(Folder(finished).read())
    found = status_of(tmp_path / "copy", 0.0)
    assert (found["state"], found["round"]) == ("unknown", 3)
    assert "no status.json" in in_words(tmp_path / "copy", found, 0.0)


def test_a_run_that_waits_for_its_clients_says_what_was_logged_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logged(tmp_path, fresh=True):
        assert hanse(capsys, "status", tmp_path).out == f"{tmp_path}: not begun: nothing in log.jsonl yet\n"
        logging.getLogger("hanse.engines").info("ada is there: 1 of 2")
    assert hanse(capsys, "status", tmp_path).out == f"{tmp_path}: not begun: ada is there: 1 of 2\n"


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(hanse(capsys, "status", tmp_path / "nothing"), 2, "nothing holds no run")
    refused(hanse(capsys, "status"), 2, "DIR")


def test_phases_share_the_time_out() -> None:
    phases, began = Phases(), time.perf_counter()
    for name in ("waiting", "stepping", "evaluating", "saving", "stepping"):
        time.sleep(0.002)
        phases.turn(name)
    spent = time.perf_counter() - began
    assert all(seconds >= 0.002 for seconds in phases.spent.values())
    assert sum(phases.spent.values()) == pytest.approx(spent, abs=0.002)
