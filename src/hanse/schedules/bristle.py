"""Bristle's conversation: peers send their output columns to their neighbours, and try some of those that arrive.

Verbraeken, de Vos, Pouwelse: "Bristle: Decentralized Federated Learning in Byzantine, Non-i.i.d. Environments", 2021,
arXiv 2110.11006. What a peer does with the candidates is the rule ``Bristle``.

    every round, at peer i:  train; send W_i to the neighbours; choose candidates among the W_j received; integrate them into W_i

    groups           peers sorted by ||W_i - W_j|| and cut into three equal groups; of the budget k, (1 - a)^2 from the nearest,
                     2 a (1 - a) from the middle one, and a^2 from the farthest, drawn at random
    nearest+random   the (1 - a) k nearest, and a k of the others at random                          earlier versions of their code
    random           k at random                                                                     the last version of their code

The paper's iteration integrates, trains and sends; a round is the same circle, begun elsewhere. With a = 0 the nearest group alone
would be asked, and honest peers with other classes are far away.

Our choices: quotas are rounded by largest remainders, so that they sum to k (of equal ones the nearer group's first); a group too
small for its quota is made up for from the nearest group that has more; who has fewer than three candidates takes them all; models
that are not finite are dropped first. n_ij, how many classes two peers have in common, is counted exactly; among processes of their
own it takes a private set intersection, of which both learn the number alone.

Sent: W to each neighbour in every round.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from hanse.core.errors import ConfigError
from hanse.core.messages import Tensors
from hanse.core.streams import Streams
from hanse.methods.base import Method, State
from hanse.schedules.gossip import Lockstep, stepped
from hanse.schedules.network import Network
from hanse.topologies import Mixing, Topology, complete

FEWEST = 3
"""Candidates from which on there is a choice."""
CHUNK = 1 << 20
"""Numbers that distances are taken of at a time, 4 MB of float32."""


class bristle(Lockstep):
    """Rounds of training, sending, and integrating some of what has arrived by tests of one's own."""

    topology: Topology = complete()
    """Who is whose neighbour."""
    prioritiser: Literal["groups", "nearest+random", "random"] = "groups"
    """How candidates are chosen: from three groups by distance, the nearest and some others, or at random."""
    budget: PositiveInt = 10
    """Candidates a node tries in a round, k."""
    explore: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Exploration ratio a: 0 is the nearest alone, 1 the farthest. Not used by ``random``."""

    def _begin(self, net: Network, method: Method) -> State:
        state = super()._begin(net, method)
        if "familiar" not in state:
            raise ConfigError(f"method: {method} is not allowed with {type(self).__name__}: it cannot integrate; use Bristle")
        return state

    async def _round(self, net: Network, method: Method, state: State, here: Tensor, mixing: Mixing) -> State:
        before = state["x"]
        state, here = await self._train(net, method, state, here)
        received, arrived = await net.exchange(state["x"], mixing.without(~here), before)
        nodes, message = self._candidates(state, received, arrived, net.streams, net.round)
        return stepped(state, method, await net.work(nodes, "integrate", message), net.round)

    def _candidates(self, state: State, received: Tensor, arrived: Mixing, streams: Streams, round: int) -> tuple[Tensor, Tensors]:
        """The nodes that have any candidates, and what they integrate, a row a node."""
        arrived = arrived.losing(~received.isfinite().all(1).cpu()[arrived.neighbours])
        peers, valid = self.choose(state["x"], received, arrived, streams, round)
        nodes = valid.any(1).nonzero().squeeze(1)
        peers, valid, familiar = peers[nodes], valid[nodes].to(received.device), state["familiar"]
        return nodes, {
            "x": state["x"][nodes],
            "candidates": torch.where(valid[..., None], received[peers], 0),  # 0 times what is not finite would not be 0
            "valid": valid,
            "common": (familiar[nodes, None] * familiar[peers]).sum(-1),
        }

    def choose(self, own: Tensor, received: Tensor, arrived: Mixing, streams: Streams, round: int) -> tuple[Tensor, Tensor]:
        """Each node's candidates among those whose models ``received`` ``[N, P]`` have ``arrived``, by distance from its ``own``.

        int64 ``[N, k]`` and whether there is one at each place, bool; k is the most that any node has.
        """
        degrees, senders, receivers = arrived.degrees, arrived.neighbours, arrived.receivers
        some = max(1, CHUNK // own.shape[1])
        pairs = zip(torch.split(receivers, some), torch.split(senders, some), strict=True)
        far = torch.cat([(own[i] - received[j]).norm(dim=1) for i, j in pairs]).double().cpu()
        drawn = streams.uniform("bristle.candidates", receivers, round, extra=senders)[:, 0].cpu()
        order = _by(receivers, far)
        senders, drawn = senders[order], drawn[order]  # by node, the nearest first
        rank = torch.arange(len(order)) - arrived.offsets[receivers]
        sizes, quotas = self._groups(degrees)
        group = (rank[:, None] >= sizes.cumsum(1)[receivers]).sum(1)
        taken = torch.where(degrees[:, None] < FEWEST, sizes, filled(quotas, sizes))
        # Everybody's place in a random order of its group: those below what is taken of the group are candidates.
        cell, size = receivers * len(quotas) + group, sizes.flatten()
        mixed = _by(cell, drawn)
        place = torch.empty_like(rank).index_copy_(0, mixed, torch.arange(len(mixed)) - (size.cumsum(0) - size)[cell[mixed]])
        chosen = place < taken.flatten()[cell]
        senders, receivers = senders[chosen], receivers[chosen]
        counts = torch.bincount(receivers, minlength=len(degrees))
        column = torch.arange(len(senders)) - (counts.cumsum(0) - counts)[receivers]
        peers = torch.zeros(len(degrees), max(1, int(counts.max())), dtype=torch.int64)
        peers[receivers, column] = senders
        return peers, torch.arange(peers.shape[1]) < counts[:, None]

    def _groups(self, degrees: Tensor) -> tuple[Tensor, Tensor]:
        """Sizes of the groups of each node's neighbours, the nearest first, ``[N, groups]``, and their quotas, ``[groups]``."""
        a, k = self.explore, self.budget
        match self.prioritiser:
            case "groups":
                cuts = degrees[:, None] * torch.arange(4) // 3
                return cuts.diff(), apportioned(((1 - a) ** 2, 2 * a * (1 - a), a**2), k)
            case "nearest+random":
                quotas = apportioned((1 - a, a), k)
                nearest = degrees.clamp(max=int(quotas[0]))
                return torch.stack([nearest, degrees - nearest], 1), quotas
            case "random":
                return degrees[:, None], torch.tensor([k])


def apportioned(shares: tuple[float, ...], total: int) -> Tensor:
    """``shares`` of ``total``, which sum to 1, rounded to whole numbers that sum to it by largest remainders, int64."""
    exact = torch.tensor(shares, dtype=torch.float64) * total
    whole = (exact + 1e-9).floor()  # 0.6 of 10 is 6, whatever its last bit is; likewise ties
    rest = ((exact - whole) * 1e9).round()
    whole[rest.argsort(descending=True, stable=True)[: total - int(whole.sum())]] += 1
    return whole.long()


def filled(quotas: Tensor, sizes: Tensor) -> Tensor:
    """What is taken of groups of these ``sizes`` ``[N, groups]``, where ``quotas`` ``[groups]`` should be: what a group lacks comes
    from the nearest that has more, of two equally near the one of nearer peers.
    """
    taken = torch.minimum(quotas, sizes)
    groups = range(len(quotas))
    for group in groups:
        lacking = (quotas[group] - sizes[:, group]).clamp(min=0)
        for other in sorted(groups, key=lambda g: (abs(g - group), g)):
            more = torch.minimum(lacking, sizes[:, other] - taken[:, other])
            taken[:, other] += more
            lacking = lacking - more
    return taken


def _by(first: Tensor, then: Tensor) -> Tensor:
    """The order of entries by ``first``, and where these are equal by ``then``."""
    order = then.argsort(stable=True)
    return order[first[order].argsort(stable=True)]
