"""Liars that change the update they computed, each by itself.

u is a liar's own update ``[P]``; what is random is drawn anew for every client, round and entry.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hanse.attacks.base import Attack, Cohort, Positive

SMALLEST = 1e-10
"""Entries nearer to 0 than this are inverted as if they were this far from it."""


class sign_flip(Attack):
    """Sends ``-scale * u``. With ``scale=10`` it is the "reverse" attack of Garfield (arXiv 2010.05888)."""

    scale: Positive = 1.0
    """Factor."""

    def forged(self, cohort: Cohort) -> Tensor:
        return -self.scale * cohort.own


class scaled(Attack):
    """Sends ``scale * u``: the right direction, but too much of it."""

    scale: Positive = 10.0
    """Factor."""

    def forged(self, cohort: Cohort) -> Tensor:
        return self.scale * cohort.own


class random(Attack):
    """Sends noise instead of an update.

    Uniform noise is that of Garfield (arXiv 2010.05888): all of it is above 0, so that liars share a direction (the cosine of two
    is about 3/4); normal noise has none.
    """

    distribution: Literal["normal", "uniform"] = "normal"
    """normal: standard normal; uniform: between 0 and 1."""
    scale: Positive = 1.0
    """Factor."""

    def forged(self, cohort: Cohort) -> Tensor:
        return self.scale * (cohort.normal() if self.distribution == "normal" else cohort.uniform())


class gaussian(Attack):
    """Sends ``u`` plus normal noise."""

    scale: Positive = 1.0
    """Standard deviation of the noise."""

    def forged(self, cohort: Cohort) -> Tensor:
        return cohort.own + self.scale * cohort.normal()


class drop(Attack):
    """Sends ``u`` with some entries set to 0."""

    rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Probability that an entry is set to 0."""

    def forged(self, cohort: Cohort) -> Tensor:
        return cohort.own.masked_fill(cohort.uniform() <= self.rate, 0)


class inversion(Attack):
    """Sends ``u`` with half of its entries, drawn one by one, replaced by their reciprocals.

    Value inverting of Xu, Lyu, "A Reputation Mechanism Is All You Need", arXiv 2011.10464. Our choice: 0 stays 0, and no reciprocal
    is larger than 1e10; their code inverts ``u + 1e-10``, which makes 1e10 of 0.
    """

    def forged(self, cohort: Cohort) -> Tensor:
        u = cohort.own
        inverse = u.sign() / u.abs().clamp(min=SMALLEST)
        return torch.where(cohort.uniform() < 0.5, inverse, u)


class sign_random(Attack):
    """Sends ``u`` with the sign of every entry turned or not, at equal odds.

    Sign randomising of Xu, Lyu, "A Reputation Mechanism Is All You Need", arXiv 2011.10464.
    """

    def forged(self, cohort: Cohort) -> Tensor:
        return torch.where(cohort.uniform() < 0.5, -cohort.own, cohort.own)


class rescale(Attack):
    """Sends ``noise * r * u`` with r drawn for every entry, uniformly between ``-noise`` and ``noise``.

    Re-scaling of Xu, Lyu, "A Reputation Mechanism Is All You Need", arXiv 2011.10464, as in their code.
    """

    noise: Positive = 10.0
    """Bound of r, and the factor besides."""

    def forged(self, cohort: Cohort) -> Tensor:
        return self.noise * self.noise * (2 * cohort.uniform() - 1) * cohort.own
