"""When who talks to whom: one coroutine a file."""

from hanse.schedules.anarchic import anarchic
from hanse.schedules.cyclic import cyclic
from hanse.schedules.fedbuff import fedasync, fedbuff
from hanse.schedules.fedcompass import fedcompass
from hanse.schedules.fedfix import fedfix
from hanse.schedules.network import Network, Schedule
from hanse.schedules.staleness import Staleness
from hanse.schedules.synchronous import synchronous

__all__ = ["Network", "Schedule", "Staleness", "anarchic", "cyclic", "fedasync", "fedbuff", "fedcompass", "fedfix", "synchronous"]
