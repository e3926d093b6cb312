"""What an engine is: the settings of one way to run a conversation."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from hanse.core.part import Part


class Engine(Part):
    """Base of all engines."""

    kind: ClassVar[str] = "engine"
    abstract: ClassVar[bool] = True


class Arrangement(NamedTuple):
    """How clients are laid out on a machine: gradient path, clients per batch, batches at a time, threads inside one operation."""

    path: str
    chunk: int
    workers: int
    threads: int
