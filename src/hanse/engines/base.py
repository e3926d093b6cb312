"""What an engine is: the settings of one way to run a conversation."""

from __future__ import annotations

from typing import ClassVar

from hanse.core.part import Part


class Engine(Part):
    """Base of all engines."""

    kind: ClassVar[str] = "engine"
    abstract: ClassVar[bool] = True
