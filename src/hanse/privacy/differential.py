"""Differential privacy of clients: what is released hardly depends on whether any one client took part.

McMahan, Ramage, Talwar, Zhang: "Learning Differentially Private Recurrent Language Models", ICLR 2018, arXiv 1710.06963: each
client's whole contribution is clipped to norm S, and the sum gets Gaussian noise. All weigh the same, w_k = 1, and the sum is
divided by the expected number of clients m = q N (the paper's estimator f_f), not by how many came.

    Delta_i <- Delta_i min(1, S / |Delta_i|)                         |.| over everything client i sends
    mean     = (sum_i Delta_i + N(0, z^2 S^2)) / m

``adaptive``: Andrew, Thakkar, McMahan, Ramaswamy: "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, arXiv
1905.03871, algorithm 1: the bound follows the gamma-quantile of the norms by bits that are noised as well.

    b_i = 1 if |Delta_i| <= S else 0
    b    = 1/2 + (sum_i (b_i - 1/2) + N(0, sigma_b^2)) / m
    S   <- S exp(-eta (b - gamma))
    the sum's noise is z_Delta S with z_Delta = (z^-2 - (2 sigma_b)^-2)^(-1/2), so that both together cost what z costs

What holds: who sees the models of all rounds learns about any one client what ``epsilon`` and delta allow. The server itself is
trusted with what clients send, unless ``secure`` hides it (whose rounding adds at most sqrt(P) 2^-(f+1) to a clipped norm). Not
covered by the noise are reports beside the model, such as training losses, who took part, and the time and bytes of single clients.
Noise comes from the run's ``Streams``: who knows the seed can subtract it. That suits experiments; a run that protects people needs
a secret seed, and noise in floating point has gaps that an exact proof does not (Mironov: "On significance of the least significant
bits for differential privacy", CCS 2012).

How it is used
--------------
Shortcuts that add clients up before they are clipped must be off. ``bound``, at first ``part.clip``, is part of a run's state. For
every batch's ``Upload``, and then for the round::

    part.check(upload)
    upload.sums = part.protect(upload.sums, upload.weight, bound)               # [C, P_name] each, all names clipped together
    ...                                                                         # added up over batches and clients, as ever
    total, bound = part.release(total, bound, cohort, streams, round)
    reply = Reply(..., sums=total, total=float(cohort))                         # the fixed denominator
    spent = part.epsilon(rounds=round + 1, cohort=cohort, clients=N, draw="bernoulli")

``protect`` adds one more sum where the bound is adaptive, which ``release`` takes out. Every round counts as a release. One to
which nobody came is to be released as well, from sums of zeros: to skip it shows that nobody came, which the accounting does not
cover.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from hanse.core.errors import ConfigError, PrivacyError
from hanse.core.messages import Tensors
from hanse.core.streams import Streams
from hanse.privacy.base import Privacy

WITHIN = "within bound"
"""The name of the sum of b_i - 1/2."""
Draw = Literal["bernoulli", "fixed"]


class differential(Privacy):
    """Differential privacy of clients: contributions clipped to a norm, Gaussian noise on their sum."""

    clip: PositiveFloat = 1.0
    """S: bound of a contribution's norm; with ``adaptive``, the first one."""
    noise: NonNegativeFloat = 1.0
    """z: noise in units of the bound. 0 only clips, and protects nobody."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Chance that the guarantee fails, well below 1 / clients."""
    adaptive: bool = False
    """Move the bound towards a quantile of the norms."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """gamma: share of clients that should be within the bound."""
    rate: PositiveFloat = 0.2
    """eta: step of the bound's logarithm."""
    bit_noise: PositiveFloat | None = None
    """sigma_b: noise on the number of clients within the bound; None: a twentieth of the cohort."""

    @model_validator(mode="after")
    def _possible(self) -> differential:
        if self.bit_noise is not None and not self.adaptive:
            raise ValueError(f"differential.bit_noise: {self.bit_noise} is not allowed without adaptive")
        if self.bit_noise is not None and self.noise >= 2 * self.bit_noise:
            raise ValueError(f"differential.noise: {self.noise} is not allowed: less than 2 bit_noise, {2 * self.bit_noise}")
        return self

    def protect(self, sums: Tensors, weight: Tensor, bound: float) -> Tensors:
        """Contributions ``[C, P_name]`` with each client's norm over all names at most ``bound``, as new tensors.

        Raises ``PrivacyError`` if weights ``[C]`` are not all 1, if clients have been added up already, if there are batch-norm
        statistics (values, not changes, which clipping would shrink), or if a contribution is not finite.
        """
        if not bool((weight == 1).all()):
            raise PrivacyError("differential: clients weigh differently, which no noise hides; use a rule with weights='uniform'")
        for name, rows in sums.items():
            if rows.dim() != 2:
                raise PrivacyError(f"differential: {name!r} has been added up before it was clipped; switch shortcuts off")
            if name == "buffers" and rows.numel():
                raise PrivacyError(
                    "differential: batch-norm statistics cannot be clipped; use a model without, or keep them private"
                )
        factor, within = _shrinking(torch.stack([norms(rows) for rows in sums.values()]).norm(dim=0), bound, weight.dtype)
        protected = {name: rows * factor[:, None] for name, rows in sums.items()}
        return {**protected, WITHIN: within[:, None].to(weight.dtype) - 0.5} if self.adaptive else protected

    def release(self, total: Tensors, bound: float, cohort: int, streams: Streams, round: int) -> tuple[Tensors, float]:
        """The sums ``[P_name]`` over clients with noise, as new tensors, and the next bound.

        ``cohort`` is m, the expected number of clients.
        """
        scale, bits = self.scales(cohort)
        noised = {
            name: self._noised(name, values, scale * bound, streams, round) for name, values in total.items() if name != WITHIN
        }
        if not self.adaptive:
            return noised, bound
        count = float(self._noised(WITHIN, total[WITHIN], bits, streams, round))
        return noised, bound * math.exp(-self.rate * (0.5 + count / cohort - self.quantile))

    def scales(self, cohort: int) -> tuple[float, float]:
        """``(z_Delta, sigma_b)``: noise of the sum in units of the bound, and of the number of clients within it."""
        if not self.adaptive or not self.noise:
            return self.noise, 0.0
        bits = cohort / 20 if self.bit_noise is None else self.bit_noise
        if self.noise >= 2 * bits:
            raise ConfigError(
                f"differential.noise: {self.noise} is not allowed: with a cohort of {cohort} less than 2 bit_noise, {2 * bits:g}; "
                "take a larger cohort or set bit_noise"
            )
        return (self.noise**-2 - (2 * bits) ** -2) ** -0.5, bits

    def epsilon(self, rounds: int, cohort: int, clients: int, draw: Draw = "bernoulli") -> float:
        """The privacy spent by ``rounds`` releases, at ``delta``; needs the extra ``privacy``.

        bernoulli: each of the ``clients`` takes part with probability cohort / clients, as in ``synchronous(draw="bernoulli")``;
        for a client more or less. fixed: a uniform draw of exactly ``cohort``; for one client in place of another, which moves the
        sum by 2 S, so that noise z counts as z / 2. Both need a draw that nobody outside sees and nothing but chance decides. Where
        that is not so (traces, late replies), ``cohort=clients`` leaves out what sampling gains; it holds if each client counts at
        most once a release.
        """
        if not 1 <= cohort <= clients:
            raise ConfigError(f"cohort: {cohort} is not allowed: from 1 to the number of clients, {clients}")
        if rounds and not self.noise:
            return math.inf
        if not rounds:
            return 0.0
        self.require("dp_accounting")
        from dp_accounting.rdp import compute_epsilon

        orders, rdp = _one_round(self.noise, cohort, clients, draw)
        return float(compute_epsilon(orders, rounds * rdp, self.delta)[0])

    def _noised(self, name: str, values: Tensor, deviation: float, streams: Streams, round: int) -> Tensor:
        if not deviation:
            return values.clone()
        noise = torch.randn(values.shape, dtype=values.dtype, generator=streams.torch(f"privacy/{name}", round=round))
        return values + deviation * noise.to(values.device)


def clipped(rows: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Each row of ``[C, P]`` shrunk to norm ``bound`` if it is longer, and whether it was not, bool ``[C]``.

    No norm exceeds the bound, not by rounding either. Raises ``PrivacyError`` if a row is not finite.
    """
    factor, within = _shrinking(norms(rows), bound, rows.dtype)
    return rows * factor[:, None], within


def norms(rows: Tensor) -> Tensor:
    """Of each row of ``[C, P]``, float64 ``[C]``."""
    found: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return found


def _shrinking(norms: Tensor, bound: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What contributions of these norms ``[C]`` are multiplied by, and whether they are within the bound."""
    if not bool(norms.isfinite().all()):
        raise PrivacyError("differential: a client's contribution is not finite; lower lr or set the rule's clip")
    within = norms <= bound
    # Two roundings are to come, of the factor and of the product, each of half an epsilon.
    factor = (bound / norms * (1 - 2 * torch.finfo(dtype).eps)).masked_fill(within, 1)
    return factor.to(dtype), within


@lru_cache(maxsize=64)
def _one_round(noise: float, cohort: int, clients: int, draw: Draw) -> tuple[Any, Any]:
    """Renyi orders and one release's divergence at each; those of several releases add up."""
    from dp_accounting import NeighboringRelation, dp_event
    from dp_accounting.rdp import RdpAccountant

    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of orders that it leaves out, which only makes the bound less tight
    if draw == "bernoulli":
        accountant = RdpAccountant()
        accountant.compose(dp_event.PoissonSampledDpEvent(cohort / clients, dp_event.GaussianDpEvent(noise)))
    else:
        accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
        accountant.compose(dp_event.SampledWithoutReplacementDpEvent(clients, cohort, dp_event.GaussianDpEvent(noise / 2)))
    log.setLevel(level)
    return np.asarray(accountant.orders), np.asarray(accountant.rdp)
