"""Who takes part, as each node sees it: a view that nodes merge when they meet, and the order in which a round asks them.

Of MoDeST (de Vos et al., arXiv 2302.13837), without messages or time. Views may differ from node to node: a merge is a maximum in
every entry, so it is commutative, associative and idempotent, and views that have heard of the same things are equal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

JOIN, LEAVE = 0, 1


@lru_cache(maxsize=1 << 17)
def digest(node: int, round: int) -> bytes:
    """What ``node`` is sorted by in ``round``: SHA-256 of ``node-round``, the first 128 bits (our choice; the authors take MD5)."""
    return hashlib.sha256(f"{node}-{round}".encode()).digest()[:16]


@dataclass(frozen=True, eq=False)
class View:
    """What one node knows of the others; never changed in place.

    ``rows`` int64 ``[n, 4]``, sorted by the first column: node, last round in which it was heard of, its counter, and what that
    counter stands for, ``JOIN`` or ``LEAVE``. It is also what travels.
    """

    rows: Tensor

    @classmethod
    def everyone(cls, nodes: int) -> View:
        """The view that all start with: ``nodes`` nodes that have joined once, in round 0."""
        zero = torch.zeros(nodes, dtype=torch.int64)
        return cls(torch.stack([torch.arange(nodes), zero, zero + 1, zero + JOIN], 1))

    @classmethod
    def entry(cls, node: int, last_round: int, counter: int, event: int = JOIN) -> View:
        """What is to be known of one node."""
        return cls(torch.tensor([[node, last_round, counter, event]]))

    def merge(self, other: View) -> View:
        """MERGE: per node the later round, and the event of the larger counter; of equal counters LEAVE wins (our choice)."""
        if torch.equal(self.rows, other.rows):
            return self
        both = torch.cat([self.rows, other.rows]).numpy()
        nodes, place = np.unique(both[:, 0], return_inverse=True)
        last, rank = np.zeros((2, len(nodes)), np.int64)
        np.maximum.at(last, place, both[:, 1])
        np.maximum.at(rank, place, 2 * both[:, 2] + both[:, 3])  # the event is its last bit
        return View(torch.from_numpy(np.stack([nodes, last, rank // 2, rank % 2], 1)))

    def of(self, node: int) -> tuple[int, int, int] | None:
        """Last round, counter and event of ``node``; None if it is not known."""
        row = self.rows[self.rows[:, 0] == node, 1:].flatten().tolist()
        return (row[0], row[1], row[2]) if row else None

    @cached_property
    def latest(self) -> int:
        """The last round in which anybody was heard of."""
        return int(self.rows[:, 1].max()) if len(self.rows) else 0

    @property
    def known(self) -> list[int]:
        """All nodes, those that have left too."""
        return [int(node) for node in self.rows[:, 0]]

    def present(self, round: int, inactive: int) -> list[int]:
        """Who has not left, and was heard of at most ``inactive`` rounds before ``round``."""
        there = (self.rows[:, 3] != LEAVE) & (self.rows[:, 1] >= round - inactive)
        return [int(node) for node in self.rows[there, 0]]

    def order(self, round: int, me: int, inactive: int) -> list[int]:
        """ORDER: who may be in the sample of ``round``, those first who are asked first. A node always counts itself."""
        return sorted({*self.present(round, inactive), me}, key=lambda node: digest(node, round))
