"""The command line inside this process: what it prints, and the status it leaves with."""

from __future__ import annotations

import signal
import sys
from typing import NamedTuple

import pytest


class Outcome(NamedTuple):
    """``hanse`` after it has run."""

    status: int
    out: str
    err: str


def hanse(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Run ``hanse ARGUMENTS``."""
    from hanse.cli import main

    given, handler = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = ["hanse", *map(str, arguments)]
    capsys.readouterr()
    try:
        main()
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    finally:
        sys.argv = given
        signal.signal(signal.SIGINT, handler)
    return Outcome(status, *capsys.readouterr())


def refused(outcome: Outcome, status: int, *words: str) -> None:
    """One line on stderr that begins with ``hanse: `` and says the words; nothing else."""
    assert outcome.status == status, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("hanse: ") and outcome.out == "", outcome
    line = lines[0].casefold()  # releases of typer differ in case
    assert all(word.casefold() in line for word in words), line
