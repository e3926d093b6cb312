"""Where a conversation runs."""

from hanse.engines.base import Engine
from hanse.engines.local import local

__all__ = ["Engine", "local"]
