"""Where a conversation runs."""

from hanse.engines.base import Engine
from hanse.engines.flower import flower
from hanse.engines.local import local
from hanse.engines.processes import processes
from hanse.engines.ray import ray

__all__ = ["Engine", "flower", "local", "processes", "ray"]
