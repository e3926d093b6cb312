"""Where a run is, in a small file of its folder: written while it goes on, and read by whoever wants to know."""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hanse.core.errors import CheckpointError
from hanse.track.folder import LOG, SETTINGS, STATUS, Folder
from hanse.track.summary import and_text, cost_text

log = logging.getLogger(__name__)

PAUSE = 1.0
"""Least seconds between two writes."""
BEAT = 10.0
"""Seconds after which the file is written although nothing has changed."""
STALE = 60.0
"""Seconds after which a file says nothing any more about a process of another machine."""
PHASES = "waiting", "stepping", "evaluating", "saving"
"""``waiting`` for clients, which in a simulation is their work; ``stepping``: whatever else the server does itself."""
FIELDS = {
    "run": str,
    "state": str,
    "why": str,
    "round": int,
    "rounds": int,
    "now": float,
    "phase": str,
    "since": float,
    "began": float,
    "written": float,
    "spent": dict,
    "bytes_down": int,
    "bytes_up": int,
    "failures": dict,
    "engine": str,
    "clients": list,
    "metrics": str,
    "host": str,
    "process": int,
    "born": str,
}
"""What the file says, and its types.

``now`` is the run's own time in seconds, all other times are seconds since 1970; ``spent`` is seconds by phase; ``clients`` are
``{name, state, since, why}``, none in a simulation; ``born`` tells ``process`` from a later one of the same number. ``state`` is
running, finished, stopped or failed."""


class Phases:
    """How long a run has been in which phase."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PHASES, 0.0)
        self.name, self.since, self._began = "stepping", time.time(), time.perf_counter()

    def turn(self, name: str) -> None:
        """A phase begins, and with it the one before is over."""
        now = time.perf_counter()
        self.spent[self.name] += now - self._began
        self.name, self.since, self._began = name, time.time(), now


class Status:
    """Keeps ``status.json`` in ``folder`` as ``tell`` says, in a thread of its own: it stays fresh however long a round takes."""

    def __init__(self, folder: Folder, tell: Callable[[], dict[str, Any]]) -> None:
        self.folder, self.tell = folder, tell
        me = os.getpid()
        self.me = {"began": time.time(), "host": platform.node(), "process": me, "born": born(me)}
        self._over = threading.Event()
        self._write(self._found("running", ""))
        self._thread = threading.Thread(target=self._keep, name="hanse-status", daemon=True)
        self._thread.start()

    def end(self, state: str, why: str = "") -> None:
        """The run is over; ``why``, if that is not as it should be."""
        self._over.set()
        self._thread.join()
        self._write(self._found(state, why))

    def _found(self, state: str, why: str) -> dict[str, Any]:
        return {"state": state, "why": why, **self.tell(), **self.me}

    def _keep(self) -> None:
        before, written = dict[str, Any](), 0.0
        while not self._over.wait(PAUSE):
            found = self._found("running", "")
            if found != before or time.monotonic() - written > BEAT:
                self._write(found)
                before, written = found, time.monotonic()

    def _write(self, found: dict[str, Any]) -> None:
        try:
            self.folder.replace(STATUS, json.dumps({**found, "written": time.time()}).encode())
        except CheckpointError as error:  # nothing is lost that the run needs; if the disk is full, its checkpoint will say so
            log.warning("%s", error)


def born(process: int) -> str:
    """What tells a process from a later one of the same number, where the system says it; else nothing."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def alive(process: int, birth: str) -> bool:
    """Whether a process of this machine is there, and still the same."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return born(process) == birth


def status_of(path: Path, now: float) -> dict[str, Any]:
    """Where the run in ``path`` is at the time ``now``: what its file says, judged.

    ``state`` may besides be ``died``: it says running, and its process is gone; ``silent``: its process is on another machine and
    has not written for long; ``unknown`` or ``not begun``: the run has no such file. Raises ``CheckpointError`` on a damaged one.
    """
    try:
        found: dict[str, Any] = json.loads((path / STATUS).read_bytes())
    except FileNotFoundError:
        return _without(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATUS} is damaged: {error}") from None
    for name, kind in FIELDS.items():
        value = found.get(name) if isinstance(found, dict) else None
        if not isinstance(value, kind) and not (kind is float and isinstance(value, int)):
            raise CheckpointError(f"{path / STATUS} is damaged: {name} is {value!r}")
    if found["state"] == "running":
        if found["host"] == platform.node():
            found["state"] = "running" if alive(found["process"], found["born"]) else "died"
        elif now - found["written"] > STALE:
            found["state"] = "silent"
    return found


def _without(path: Path) -> dict[str, Any]:
    """Where a run is that has no ``status.json``: it was saved by ``Run.save``, or has not begun."""
    state = "unknown" if (path / SETTINGS).is_file() else "not begun"
    return {"run": path.resolve().name, "state": state, "round": len(Folder(path).history())}


def in_words(path: Path, found: dict[str, Any], now: float) -> str:
    """What ``status_of`` has found, for a person."""
    lines = [f"{path}: {found['state']}{_where(path, found, now)}"]
    if "written" not in found:
        return lines[0]
    took = cost_text("seconds", max(0.0, found["written"] - found["began"]))
    own = f", at {cost_text('seconds', found['now'])} of its own time" if found["now"] else ""
    lines += [f"round {found['round']} of {found['rounds']}{own}; {took} since {moment(found['began'])}"]
    down, up = (cost_text("bytes", found[f"bytes_{way}"]) for way in ("down", "up"))
    failures = [f"{n} {kind}" for kind, n in found["failures"].items() if n]
    lines += [f"{down} down, {up} up; failures: {', '.join(failures) or 'none'}"]
    spent = {**found["spent"]}
    if found["state"] == "running" and found["phase"] in spent:
        spent[found["phase"]] += max(0.0, now - found["since"])
    total = sum(spent.values())
    if total:
        lines += ["time: " + ", ".join(f"{100 * s / total:.0f} % {phase}" for phase, s in spent.items() if s > 0.005 * total)]
    if found["metrics"] and found["state"] == "running":
        lines += [f"metrics: http://{found['metrics']}/metrics"]
    if found["clients"]:
        states = Counter(client["state"] for client in found["clients"])
        lines += ["clients: " + ", ".join(f"{n} {state}" for state, n in sorted(states.items()))]
        width = max(len(client["name"]) for client in found["clients"])
        for client in found["clients"]:
            since = cost_text("seconds", max(0.0, now - client["since"]))
            lines += [f"  {client['name']:{width}}  {client['state']:8} {since:>7}  {client['why']}".rstrip()]
    return "\n  ".join(lines)


def _where(path: Path, found: dict[str, Any], now: float) -> str:
    """What follows the state: what it is at, or what there is to do."""
    who = f"process {found['process']} on {found['host']}" if "process" in found else ""
    again = f"hanse resume {path}"
    if found.get("engine") == "flower":
        again = "flwr run, with the same app"
    match found["state"]:
        case "running":
            return f", {found['phase']} for {cost_text('seconds', max(0.0, now - found['since']))}, {who}"
        case "stopped":
            return f" after round {found['round']}; go on with: {again}"
        case "failed":
            return f" after round {found['round']}: {found['why']}"
        case "died":
            return f" after round {found['round']}: {who} is gone; go on with: {again}"
        case "silent":
            ago = cost_text("seconds", now - found["written"])
            return f": nothing written for {ago}; look on {found['host']} whether process {found['process']} is alive"
        case "not begun" if (path / LOG).is_file():
            return f": {last_logged(path)}"
        case "unknown":
            return f" after round {found['round']}: no {STATUS}; if it did not finish, go on with: {again}"
    return ""


def last_logged(path: Path) -> str:
    """What the log of a run said last."""
    try:
        said: str = json.loads((path / LOG).read_bytes().splitlines()[-1])["message"]
        return said
    except (OSError, ValueError, LookupError, TypeError):
        return f"nothing in {LOG} yet"


def study_in_words(found: list[dict[str, Any]]) -> str:
    """A line over several runs: how many are in which state."""
    states = Counter(one["state"] for one in found)
    return and_text([f"{n} {state}" for state, n in states.items()])


def moment(when: float) -> str:
    """A time as a date, UTC."""
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M:%S} UTC"
