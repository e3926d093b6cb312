"""Imports point one way: every room of ``src/hanse`` imports only what its row of ``MAY_IMPORT`` names, anywhere in its files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "hanse"

BELOW = {"core", "data", "fleet", "codecs", "topologies", "aggregators", "attacks", "privacy", "models"}
MAY_IMPORT = {
    "core": set(),
    "models": set(),
    "fleet": {"core"},
    "transport": {"core"},
    "hierarchy": {"core", "transport"},
    "codecs": {"core"},
    "topologies": {"core"},
    "aggregators": {"core", "topologies"},
    "attacks": {"core"},
    "privacy": {"core"},
    "data": {"core", "models"},
    "llm": {"core", "data"},
    "methods": BELOW,
    "schedules": BELOW | {"methods.base"},
    "federation": {"core", "data", "fleet"},
    "engines": BELOW | {"transport", "federation", "methods.base", "schedules.network", "schedules.peers"},
    "track": {"core", "data"},
    "config": BELOW | {"llm", "federation", "methods", "schedules", "engines"},
    "catalogue": BELOW | {"llm", "methods", "schedules", "engines"},
    "systems": set(),
    "experiment": BELOW | {"federation", "methods", "schedules", "engines", "config", "track"},
    "export": {"core", "config", "track"},
    "study": BELOW | {"federation", "methods", "schedules", "engines", "config", "track", "experiment"},
}
"""Module prefixes below ``hanse`` that each room may import besides itself. Rooms left out are entrances and may import all."""

ENTRANCES = {"__init__", "cli", "bench", "reproduce", "parity", "deploy"}


def room(file: Path) -> str:
    """The folder or top-level module that a file belongs to."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Modules below ``hanse`` that a source text imports, at the top, in a function or for type checking alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            # The name may be a module of its own: 'from hanse import codecs' imports hanse.codecs.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("hanse.") for name in names if name.startswith("hanse."))


def allows(prefixes: set[str], module: str) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in prefixes)


def test_every_room_is_in_the_table() -> None:
    rooms = {room(file) for file in SOURCE.rglob("*.py")}
    assert rooms - ENTRANCES == set(MAY_IMPORT)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_one_way(name: str) -> None:
    found = [
        f"{file.relative_to(SOURCE)} imports hanse.{module}"
        for file in SOURCE.rglob("*.py")
        if room(file) == name
        for module in imported(file.read_text())
        if not allows(MAY_IMPORT[name] | {name}, module)
    ]
    assert found == []


def test_an_import_anywhere_is_seen() -> None:
    source = """
import hanse.track.run, torch
from hanse import codecs
if TYPE_CHECKING:
    from hanse.core.part import Part
def late():
    from hanse.experiment import run
"""
    assert sorted(imported(source)) == ["codecs", "core.part.Part", "experiment.run", "track.run"]
    assert allows({"methods.base"}, "methods.base.Method")
    assert not allows({"methods.base"}, "methods.fedavg.FedAvg")
    assert not allows({"methods"}, "methods_of_others")
