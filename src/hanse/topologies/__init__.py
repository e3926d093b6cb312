"""Who talks to whom where there is no server: graphs, and the weights of gossip on them."""

from hanse.topologies.base import Topology
from hanse.topologies.drawn import erdos_renyi, random_neighbours, random_regular, scale_free
from hanse.topologies.fixed import complete, exponential, file, one_peer_exponential, ring, star, torus
from hanse.topologies.mixing import Mixing, consensus_distance

__all__ = [
    "Mixing",
    "Topology",
    "complete",
    "consensus_distance",
    "erdos_renyi",
    "exponential",
    "file",
    "one_peer_exponential",
    "random_neighbours",
    "random_regular",
    "ring",
    "scale_free",
    "star",
    "torus",
]
