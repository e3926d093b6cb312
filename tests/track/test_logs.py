"""The log of a run: words for people, records for machines."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hanse.config import Settings
from hanse.core.errors import CheckpointError
from hanse.study import Study
from hanse.track.folder import LOG
from hanse.track.logs import logged

log = logging.getLogger("hanse.engines.tried")
ENGINE = 'local("stacked", 3, 1, 1)'


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_a_record_says_when_who_and_what_it_is_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logged(tmp_path / "ä", fresh=True):
        log.warning("client %d is refused:\n%s", 3, "ä", extra={"client": 3, "round": 2})
        log.debug("nobody wants to know")
    (found,) = records(tmp_path / "ä")
    assert found.pop("time").endswith("+00:00")
    about = {"run": "ä", "round": 2, "client": 3, "worker": None}
    assert found == {"level": "warning", "logger": "hanse.engines.tried", **about, "message": "client 3 is refused:\nä"}
    assert capsys.readouterr().err.endswith("WARNING client 3 is refused:\nä\n")


def test_stderr_has_what_is_important_enough_and_the_file_has_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logged(tmp_path, fresh=True, least=logging.WARNING):
        log.info("one")
        log.error("two")
    assert [r["message"] for r in records(tmp_path)] == ["one", "two"]
    assert "one" not in (err := capsys.readouterr().err) and "ERROR two" in err


def test_an_error_brings_its_trace(tmp_path: Path) -> None:
    with logged(tmp_path, fresh=True):
        try:
            raise OSError("no disk")
        except OSError:
            log.exception("so it goes")
    assert records(tmp_path)[0]["error"].endswith("OSError: no disk")


def test_a_run_that_goes_on_adds_and_a_new_one_starts_over(tmp_path: Path) -> None:
    for fresh, expected in ((True, ["x"]), (False, ["x", "x"]), (True, ["x"])):
        with logged(tmp_path, fresh):
            log.info("x")
        assert [r["message"] for r in records(tmp_path)] == expected


def test_afterwards_all_is_as_before(tmp_path: Path) -> None:
    top = logging.getLogger("hanse")
    before = (top.level, [*top.handlers])
    with pytest.raises(ZeroDivisionError), logged(tmp_path, fresh=True):
        _ = 1 / 0
    assert (top.level, top.handlers) == before
    log.warning("too late")
    assert records(tmp_path) == []


def test_where_nothing_can_be_written_it_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"), logged(tmp_path / "file" / "run", fresh=True):
        pass


def test_every_run_of_a_study_has_its_own(tmp_path: Path) -> None:
    Study(Settings(task="digits(hidden=4)", clients=6, cohort=3, rounds=2, seed=(0, 1), engine=ENGINE), tmp_path).run()
    for seed in (0, 1):
        found = records(tmp_path / f"fedavg-seed{seed}")
        assert [r["message"] for r in found] == ["begins after round 0 of 2", "finished after round 2 of 2"]
        assert {r["run"] for r in found} == {f"fedavg-seed{seed}"}
