"""When who talks to whom: one coroutine a file."""

from hanse.schedules.network import Network, Schedule
from hanse.schedules.synchronous import synchronous

__all__ = ["Network", "Schedule", "synchronous"]
