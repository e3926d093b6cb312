"""What is shown while runs go on."""

import io
import re

import made_runs
import pytest
from rich.console import Console

from hanse.track import progress
from hanse.track.progress import Display, status


def shown(terminal: bool, monkeypatch: pytest.MonkeyPatch, pause: float = 0.0) -> str:
    """Everything printed during two runs of three rounds each."""
    monkeypatch.setattr(progress, "PLAIN_SECONDS", pause)
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=terminal, width=200), runs=2, rounds=3) as display:
        for label in ("fedavg-seed0", "fedavg-seed1"):
            writer = display.run(label)
            for t, accuracy in enumerate((0.25, None, 0.75), 1):
                writer.write(made_runs.record(t, accuracy=accuracy, loss=0.5, down=2_000_000 * t, up=1000 * t, seconds=60.0 * t))
            writer.close()
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(False, monkeypatch).splitlines()
    assert len(lines) == 6 and "\x1b" not in "".join(lines)
    assert re.fullmatch(
        r"fedavg-seed0  round 2/3  loss 0.500  accuracy 0.250  down 4.*B  up 2.*B  virtual 2.*min.*  .* left", lines[1]
    )
    assert "round 3/3" in lines[2] and "accuracy 0.750" in lines[2]
    assert lines[5].startswith("fedavg-seed1  round 3/3") and re.search(r"  0\S* \S+ left$", lines[5])


def test_plain_lines_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a while, and the last of each run."""
    assert len(shown(False, monkeypatch, pause=1000.0).splitlines()) == 2


def test_a_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = shown(True, monkeypatch)
    assert "\x1b" in out and "6/6" in out and "fedavg-seed1" in out and "left" in out


def test_rounds_done_before_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run that is read from its folder moves the bar on."""
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=200), runs=2, rounds=3) as display:
        display.finish()
        display.run("two").write(made_runs.record(1, accuracy=0.5))
    assert "4/6" in out.getvalue()


def test_a_run_that_ends_by_time_counts_in_its_share_of_it() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=200), runs=1, rounds=1000, seconds=20.0) as display:
        display.run("one").write(made_runs.record(3, seconds=10.0))
    assert "500/1000" in out.getvalue()


def test_status_without_evaluation_and_virtual_time() -> None:
    assert status(made_runs.record(1, loss=0.25, down=10, up=20)) == "loss 0.250  down 10 B  up 20 B"


def test_status_says_what_privacy_has_cost() -> None:
    record = {**made_runs.record(1, loss=0.25, down=10, up=20, seconds=90.0), "epsilon": 1.23456}
    assert status(record) == "loss 0.250  down 10 B  up 20 B  epsilon 1.23  virtual 1.5 min"  # type: ignore[arg-type]
