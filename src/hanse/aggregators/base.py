"""What every aggregator is, and what may stand before one."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, ClassVar, Self, overload

import torch
from pydantic import Field
from torch import Tensor

from hanse.aggregators.gram import finite, one_thread
from hanse.aggregators.rows import Rows
from hanse.core.errors import ConfigError
from hanse.core.part import Part, pipeline

Faulty = Annotated[int, Field(ge=0)]
"""A number f of rows that may be anything."""


def need(rule: Part, f: int, p: int, least: int, formula: str) -> None:
    """Raise ``ConfigError`` if ``rule`` gets fewer than ``least`` rows."""
    if p < least:
        raise ConfigError(f"{rule}: f={f} and p={p} rows are not allowed: it needs p >= {formula} = {least}")


def shares(weights: Tensor | None, p: int) -> Tensor:
    """Weights as parts of 1, float64 ``[p]``; None: all alike."""
    if weights is None:
        return torch.full((p,), 1 / p, dtype=torch.float64)
    total = weights.double().sum()
    if not bool(total > 0):
        raise ValueError(f"weights sum to {float(total)}; their sum must be positive")
    return weights.double() / total


class Aggregator(Part):
    """Base of all aggregators: callable on rows ``[C, P]`` with optional weights ``[C]``; rows are not changed.

    Rows that are not finite are dropped; p counts the rest. ``a | b`` is pre-aggregation a, then rule b.
    """

    kind: ClassVar[str] = "aggregator"
    abstract: ClassVar[bool] = True

    @property
    def centred(self) -> bool:
        """Whether it sees no difference when all rows move by one vector, which then is in its result."""
        return True

    def __call__(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """``[C, P]`` to ``[P]``. Raises ``ValueError`` if no row is finite, ``ConfigError`` if there are too few for the rule."""
        if not len(rows):
            raise ValueError(f"{self}: no rows")
        found = self.aggregate(Rows(rows), weights)
        if found is None:
            kept = finite(rows)
            if not bool(kept.any()):
                raise ValueError(f"{self}: none of the {len(rows)} rows is finite")
            everyone = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
            some = None if weights is None else weights[kept]
            found = self.aggregate(Rows(rows, everyone[kept], exact=True), some)
        if found is None:
            raise ValueError(f"{self}: rows are so large that their squares are not finite")
        return found

    def aggregate(self, rows: Rows, weights: Tensor | None) -> Tensor | None:
        """``[P]``; None as soon as something shows that rows are not finite, or that their products are not."""
        raise TypeError(f"{type(self).__name__} does not define aggregate")

    @classmethod
    def parse(cls, text: str) -> Self:
        """As for every part, and ``a | b`` for a rule after pre-aggregations."""
        *before, rule = pipeline(text)
        if not before:
            return super().parse(text)
        return reduce(or_, [*map(PreAggregation.parse, before), cls.parse(rule)])  # type: ignore[return-value]


class Combination(Aggregator):
    """Base of rules whose result is a combination of the rows, with coefficients that follow from inner products alone."""

    abstract: ClassVar[bool] = True

    def coefficients(self, gram: Tensor, weights: Tensor | None) -> Tensor:
        """``c`` float64 ``[p]`` of the result ``sum_i c_i x_i``, from inner products float64 ``[p, p]``.

        If the rule is ``centred`` they may be those of the differences from some vector; ``c`` then sums to 1.
        """
        raise TypeError(f"{type(self).__name__} does not define coefficients")

    def aggregate(self, rows: Rows, weights: Tensor | None) -> Tensor | None:
        gram = rows.gram(self.centred)
        if gram is None:
            return None
        with one_thread():
            c = self.coefficients(gram, weights)
        return rows.combined(c)


class PreAggregation(Part):
    """Base of pre-aggregations, which make new rows of the rows: a matrix that follows from inner products alone."""

    kind: ClassVar[str] = "pre-aggregation"
    abstract: ClassVar[bool] = True

    @property
    def centred(self) -> bool:
        """Whether it sees no difference when all rows move by one vector, by which the new rows then move."""
        return True

    def matrix(self, gram: Tensor) -> Tensor:
        """Float64 ``[B, p]`` by which rows ``[p, P]`` become new ones, from inner products float64 ``[p, p]``."""
        raise TypeError(f"{type(self).__name__} does not define matrix")

    @classmethod
    def parse(cls, text: str) -> Self:
        """As for every part, and ``a | b`` for a, then b."""
        stages = pipeline(text)
        return super().parse(text) if len(stages) == 1 else reduce(or_, map(cls.parse, stages))

    @overload
    def __or__(self, then: Aggregator) -> Aggregator: ...

    @overload
    def __or__(self, then: PreAggregation) -> PreAggregation: ...

    def __or__(self, then: Aggregator | PreAggregation) -> Aggregator | PreAggregation:
        if isinstance(then, Aggregator):
            return Aggregator.named("mixed")(before=self, rule=then)
        return PreAggregation.named("series")(mixings=(self, then))
