"""The weighted mean."""

from __future__ import annotations

from torch import Tensor

from hanse.aggregators.base import Aggregator, shares
from hanse.aggregators.rows import Rows


class mean(Aggregator):
    """The weighted arithmetic mean."""

    def aggregate(self, rows: Rows, weights: Tensor | None) -> Tensor | None:
        found = rows.combined(shares(weights, len(rows)).to(rows.data.device))
        return found if bool(found.isfinite().all()) else None  # what is not finite in a row is not in the mean
