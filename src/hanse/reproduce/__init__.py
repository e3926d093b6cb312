"""Experiments that show, on real data and in minutes, what the papers behind the rules claim: ``hanse reproduce SLUG ...``.

One file a paper. Each has a function ``reproduce() -> Findings`` that states its claims as properties and measures them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console

from hanse.core.errors import unknown
from hanse.reproduce.base import Findings, Property, save, tables

__all__ = ["SLUGS", "Findings", "Property", "run"]

SLUGS = (
    "anarchic",
    "bcrs-opwa",
    "bristle",
    "dfedsam",
    "fedamd",
    "fedau",
    "fedcompass",
    "fedfix",
    "fedrdma",
    "fedspeed",
    "fedzip",
    "flag",
    "frl",
    "gossip-variance",
    "lifl",
    "modest",
    "momentum",
    "rffl",
    "robustness",
    "stale-inversion",
)
"""What there is to reproduce, by the name of its file, in which ``-`` is ``_``."""


def run(slugs: Sequence[str], out: Path, console: Console | None = None) -> bool:
    """Reproduce each of ``slugs``, print its tables, and write ``result.json``, ``report.md`` and ``figure.png`` into ``out/slug``.

    Returns whether every stated property holds. Raises ``ConfigError`` on an unknown slug before anything runs.
    """
    console = console or Console()
    for slug in slugs:
        if slug not in SLUGS:
            raise unknown("reproduce", slug, SLUGS)
    held = True
    for slug in slugs:
        with console.status(f"{slug}: one or two minutes"):
            findings: Findings = import_module(f"hanse.reproduce.{slug.replace('-', '_')}").reproduce()
        for table in tables(findings):
            console.print(table)
        save(findings, out / slug)
        held &= findings.hold
    return held
