"""What every aggregator is, and the weighted mean."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from hanse.core.part import Part


class Aggregator(Part):
    """Base of all aggregators: callable on rows ``[C, P]`` with optional weights ``[C]``."""

    kind: ClassVar[str] = "aggregator"
    abstract: ClassVar[bool] = True

    def __call__(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """``[C, P]`` to ``[P]``."""
        raise TypeError(f"{type(self).__name__} does not define __call__")


class mean(Aggregator):
    """The weighted arithmetic mean."""

    def __call__(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return rows.mean(0) if weights is None else weights @ rows / weights.sum()
