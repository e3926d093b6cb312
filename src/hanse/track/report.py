"""A report of runs as one file: who is ahead, the table, the pictures, the settings. It needs no network and no script."""

from __future__ import annotations

import base64
import platform
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from hanse.core.errors import CheckpointError, DataError
from hanse.track.figures import save_all
from hanse.track.run import Run
from hanse.track.summary import doubts, finals, groups, headline, leaders, lower_is_better, summary_table, table_text, verdict

__all__ = ["summary_table", "write_report"]

WIDE = ("clients", "split", "participation", "timeline")
"""Pictures that get a row of their own."""


def write_report(runs: Sequence[Run], folder: Path, title: str) -> Path:
    """Write ``folder/report.html``, and its pictures as PNG to ``folder/figures``; returns the path of the former.

    Raises ``DataError`` without any run, and ``CheckpointError`` if the folder cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    if not runs:
        raise DataError("report: no runs to report on")
    pictures = save_all(runs, folder / "figures")
    headers, rows = table_text(runs)
    common, differing = settings(runs)
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        files("hanse.track").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    html = template.render(
        title=title,
        verdict=verdict(runs),
        doubts=doubts(runs),
        headers=headers,
        rows=rows,
        best=_best(runs),
        pictures=[(p.stem, p.stem.startswith(WIDE), base64.b64encode(p.read_bytes()).decode()) for p in pictures],
        methods=list(groups(runs)),
        common=common,
        differing=differing,
        notes=notes(runs),
        answers=answers(runs),
        versions=versions(),
    )
    path = folder / "report.html"
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"out: {path} cannot be written: {error.strerror}") from None
    return path


def _best(runs: Sequence[Run]) -> list[str]:
    """The methods with the best final value, all that tie."""
    metric = headline(runs)
    ended = {label: found for label, found in finals(runs, metric).items() if found}
    return leaders(ended, lower_is_better(metric)) if len(ended) > 1 else []


def settings(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Settings that all runs share, and those that differ with one value a method; seeds are listed in either case."""
    members = groups(runs)
    keys = [key for key in dict.fromkeys(k for run in runs for k in run.settings) if key != "seed"]
    values = {key: [group[0].settings.get(key, "-") for group in members.values()] for key in keys}
    seeds = [", ".join(str(run.seed) for run in group) for group in members.values()]
    values["seeds"] = seeds
    common = {key: found[0] for key, found in values.items() if len(set(found)) == 1}
    return common, {key: found for key, found in values.items() if key not in common}


def notes(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(what, which runs, text) of every note; runs that say the same share a row."""
    said: dict[tuple[str, str], list[str]] = {}
    for label, group in groups(runs).items():
        for run in group:
            for what, text in run.notes.items():
                said.setdefault((what, text), []).append(f"{label}, seed {run.seed}")
    rows = [(what, "all runs" if len(who) == len(runs) else "; ".join(who), text) for (what, text), who in said.items()]
    return sorted(rows, key=lambda row: list(dict.fromkeys(r[0] for r in rows)).index(row[0]))


def answers(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of what was asked, what was expected, what the models said before, and what each method's first run says in the end."""
    first = [group[0].answers for group in groups(runs).values()]
    if not all(first) or any([a["asked"] for a in said] != [a["asked"] for a in first[0]] for said in first):
        return []
    return [[row[0]["asked"], row[0]["expected"], row[0]["before"], *(a["after"] for a in row)] for row in zip(*first, strict=True)]


def versions() -> dict[str, str]:
    """What this report was made with."""
    return {"Python": platform.python_version()} | {name: version(name) for name in ("hanse", "torch", "numpy", "matplotlib")}
