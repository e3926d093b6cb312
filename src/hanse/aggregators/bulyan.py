"""Bulyan: Krum again and again, then the values nearest to the median of what it selected."""

from __future__ import annotations

import torch
from torch import Tensor

from hanse.aggregators.base import Faulty, need
from hanse.aggregators.combinations import krum_scores
from hanse.aggregators.coordinates import Coordinates, middle, nearest
from hanse.aggregators.gram import distances, one_thread
from hanse.aggregators.rows import Rows


class bulyan(Coordinates):
    """At every coordinate the mean of the p - 4 f values nearest to the median of p - 2 f selected rows.

    El Mhamdi, Guerraoui, Rouault: "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018, arXiv 1802.07927.
    Rows are selected one after another by Krum among those left, with max(1, p' - f - 2) neighbours of p' rows.

    Needs p >= 4 f + 3. Ignores weights.
    """

    f: Faulty
    """Rows that may be anything."""

    def selected(self, between: Tensor) -> Tensor:
        """Which rows Krum selects, int64 ``[p - 2 f]`` rising, by squared distances ``[p, p]``."""
        left = torch.arange(len(between), device=between.device)
        for _ in range(len(between) - 2 * self.f):
            scores = krum_scores(between[left][:, left], max(1, len(left) - self.f - 2))
            left = left[torch.arange(len(left), device=left.device) != scores.argmin()]
        gone = torch.ones(len(between), dtype=torch.bool, device=between.device).index_fill_(0, left, False)
        return gone.nonzero()[:, 0]

    def aggregate(self, rows: Rows, weights: Tensor | None) -> Tensor | None:
        gram = rows.gram(self.centred)
        if gram is None:
            return None
        need(self, self.f, len(gram), 4 * self.f + 3, "4f+3")
        everyone = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        with one_thread():
            selected = everyone[self.selected(distances(gram))]
        return super().aggregate(rows.mixed(selected), weights)

    def columns(self, x: Tensor) -> Tensor:
        return nearest(x, middle(x), len(x) - 2 * self.f)
