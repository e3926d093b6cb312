"""The log of a run: in words on stderr, and as JSON, a record a line, in the run folder.

Records about a client or a round carry them as ``extra={"client": ..., "round": ...}``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from hanse.track.folder import LOG, Folder

ABOUT = "round", "client", "worker"
"""What a record may be about, besides the run."""


@contextmanager
def logged(folder: Path, fresh: bool, least: int = logging.INFO) -> Iterator[None]:
    """Have all that hanse logs in here written to ``log.jsonl`` in ``folder``, and what is at least of level ``least`` to stderr.

    ``fresh``: an earlier log there is replaced. Raises ``CheckpointError`` where the folder cannot be made.
    """
    Folder(folder).make()
    top = logging.getLogger("hanse")
    before = top.level
    words, lines = Words(), logging.FileHandler(folder / LOG, mode="w" if fresh else "a", encoding="utf-8")
    words.setLevel(least)
    words.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    lines.setFormatter(Lines(folder.resolve().name))
    top.setLevel(logging.INFO)
    for handler in (words, lines):
        top.addHandler(handler)
    try:
        yield
    finally:
        top.setLevel(before)
        for handler in (words, lines):
            top.removeHandler(handler)
            handler.close()


class Words(logging.Handler):
    """To whatever stderr is at the moment: a live display of progress takes its place for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


class Lines(logging.Formatter):
    """A JSON object a record: ``time`` (UTC), ``level``, ``logger``, ``run``, what it is about (null: nothing), ``message``, and
    ``error`` with the trace of an exception.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run

    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "run": self.run,
            **{name: getattr(record, name, None) for name in ABOUT},
            "message": record.getMessage(),
        }
        if record.exc_info:
            found["error"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False, default=str)
