"""Liars that know what the honest clients of their cohort send, or at least how long it is.

h_1..h_H are the updates of the honest, mu and sigma their mean and standard deviation, entry by entry. Where nobody in a cohort is
honest, the liars' own updates take that place.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Annotated

from pydantic import Field, NonNegativeInt
from torch import Tensor

from hanse.attacks.base import Attack, Cohort, Positive


def most_hidden(p: int, f: int) -> float:
    """How many standard deviations f liars among p can go from the mean unnoticed.

        z = Phi^-1((p - f - s) / (p - f)),    s = floor(p / 2 + 1) - f

    s is how many honest clients they need on their side for a majority. Our choices: at least 1, where the liars are a majority
    already; and z = 0 where fewer than two are honest.
    """
    honest, s = p - f, max(1, p // 2 + 1 - f)
    return NormalDist().inv_cdf((honest - s) / honest) if honest > s else 0.0


class alie(Attack):
    """A little is enough: every liar sends ``mu - z sigma``.

    Baruch, Baruch, Goldberg: "A Little Is Enough: Circumventing Defenses For Distributed Learning", NeurIPS 2019, arXiv 1902.06156.
    sigma is the sample standard deviation (H - 1); that of a single honest client is 0.
    """

    z: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Standard deviations from the mean. None: the paper's formula for the cohort, which is small where few lie: 0 for 2 of 10 and
    0.21 for 3 of 15, but 1.43 for 24 of 50."""

    def forged(self, cohort: Cohort) -> Tensor:
        h, f = cohort.honest, len(cohort.own)
        z = most_hidden(len(cohort.values), f) if self.z is None else self.z
        return (h.mean(0) - z * h.std(0, correction=min(1, len(h) - 1))).expand_as(cohort.own)


class ipm(Attack):
    """Inner product manipulation: every liar sends ``-eps mu``.

    Xie, Koyejo, Gupta: "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation", UAI 2019, arXiv
    1903.03936. With f liars among p, ``eps`` above (p - f) / f reverses the mean of all.
    """

    eps: Positive = 0.1
    """Factor; a small one is hard to tell from an honest update."""

    def forged(self, cohort: Cohort) -> Tensor:
        return (-self.eps * cohort.honest.mean(0)).expand_as(cohort.own)


class mimic(Attack):
    """Every liar sends a copy of one honest client's update, which so counts several times.

    Karimireddy, He, Jaggi: "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022, arXiv 2006.09365. They
    choose the victim once, after the first rounds, along the direction in which updates vary most; without ``victim`` ours is
    chosen in every cohort: the update farthest from mu, because its repetition moves the mean most.
    Of several equally far, it is the one with the lowest number.
    """

    victim: NonNegativeInt | None = None
    """Number of the client that is copied in cohorts where it is there and honest. None, and in all others: the update farthest
    from the honest mean."""

    def forged(self, cohort: Cohort) -> Tensor:
        h = cohort.honest
        if self.victim is not None and bool((found := cohort.honest_clients == self.victim).any()):
            copied = int(found.int().argmax())
        else:
            copied = int((h - h.mean(0)).norm(dim=1).argmax())
        return h[copied].expand_as(cohort.own)


class free_rider(Attack):
    """Sends uniform noise between -1 and 1, clipped to the norm that updates usually have, and so saves the work.

    Free riders of Xu, Lyu, "A Reputation Mechanism Is All You Need", arXiv 2011.10464, who clip to the norm that their server asks.
    """

    norm: Positive | None = None
    """Norm that the noise is clipped to. None: the median of the honest updates' norms."""

    def forged(self, cohort: Cohort) -> Tensor:
        noise = 2 * cohort.uniform() - 1
        usual = cohort.honest.norm(dim=1).quantile(0.5) if self.norm is None else self.norm
        clipped: Tensor = noise * (usual / noise.norm(dim=1, keepdim=True)).clamp(max=1)
        return clipped
