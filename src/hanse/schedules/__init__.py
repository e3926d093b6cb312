"""When who talks to whom: one coroutine a file."""

from hanse.schedules.anarchic import anarchic
from hanse.schedules.async_gossip import async_gossip
from hanse.schedules.bristle import bristle
from hanse.schedules.cyclic import cyclic
from hanse.schedules.fedbuff import fedasync, fedbuff
from hanse.schedules.fedcompass import fedcompass
from hanse.schedules.fedfix import fedfix
from hanse.schedules.gossip import gossip
from hanse.schedules.modest import modest
from hanse.schedules.network import Network, Schedule
from hanse.schedules.peers import Node, Peers
from hanse.schedules.staleness import Staleness
from hanse.schedules.synchronous import synchronous

__all__ = [
    "Network",
    "Node",
    "Peers",
    "Schedule",
    "Staleness",
    "anarchic",
    "async_gossip",
    "bristle",
    "cyclic",
    "fedasync",
    "fedbuff",
    "fedcompass",
    "fedfix",
    "gossip",
    "modest",
    "synchronous",
]
