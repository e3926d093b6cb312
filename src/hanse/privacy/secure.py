"""Secure aggregation: the server learns the sum of the clients' vectors and no term of it.

Bonawitz et al.: "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, figure 4 without the steps
against a server that lies; with ``neighbours``, on the sparse graph of Bell et al.: "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead", CCS 2020, their semi-honest protocol. ``hanse.privacy.protocol`` has the two parties.

    client u sends    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)      modulo 2^bits
    server            sum_u x_u = sum_u y_u - sum_u PRG(b_u) -+ sum over those who left of PRG(s_uv)

``s_uv`` is what u and v agree on (X25519), ``b_u`` a seed of u's own; both b_u and u's key are shared out (Shamir) to u's
neighbours, all clients or ``neighbours`` random ones. Whoever answers the last step gives, of each client, the share of b_u if its
y_u arrived and the share of its key if not; never both, since both would bare x_u.

What the server learns: who takes part and who leaves when, the lengths of messages, and the sum over those whose y_u arrived. With
fewer survivors than the threshold it learns no sum. Together with some of the clients it learns no more than the sum over the
others, as long as fewer than the threshold of any client's neighbours are among them. A sparse graph may fall apart where clients
left or conspire; it then is a sum for each piece, so ``neighbours`` should be a good multiple of log(clients).

What is assumed: the server follows the protocol and hands on the true public keys ("semi-honest"). It could otherwise invent
clients; the paper's consistency check and signatures are not here. A sum is not anonymous by itself: the difference of two rounds'
sums, or a sum over very few clients, may tell much about one. ``differential`` is against that.

Fixed point
-----------
Values become integers, ``round(v 2^f)``, that are added modulo 2^bits. A value beyond ``clip`` is refused rather than cut, because
cutting would bias the mean silently. There are ``f`` fractional bits, such that n values cannot overflow: n round(clip 2^f) <
2^(bits - 1). So the sum is exact in integers, and in floats within n 2^-(f+1), half a unit for every client.

How it is used
--------------
Weighted sums are sums of ``weight_i v_i / heaviest``, with the weight as one more entry; ``heaviest``, the largest weight a client
can have, is known to all. For an ``Upload`` of C clients, after ``part.check(upload)`` (a rule that declares rows cannot be used)::

    fixed = part.fixed(cohort, heaviest)
    vectors = fixed.encode(upload.sums, upload.weight)                          # integers [C, 1 + sum of P_name]
    total, included = aggregate(part, dict(zip(ids, vectors)), gone=(...))      # hanse.privacy.protocol
    sums, weight = fixed.decode(total, {name: v.shape[1] for name, v in upload.sums.items()})

An engine that only simulates may leave out the cryptography, which does not change a bit of the result: ``vectors.sum(0,
dtype=vectors.dtype)`` over those who are included is ``total``, and ``part.traffic`` has the bytes. What else a server is told has
to stop or be added up as well: each client's loss, its number of samples, and the size of a message that depends on its values.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor

from hanse.core.errors import ConfigError, PrivacyError
from hanse.core.messages import Tensors
from hanse.privacy.base import Privacy

if TYPE_CHECKING:
    from hanse.privacy.protocol import Client, Server

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
Entropy = Callable[[int], bytes]
"""Unpredictable bytes, as many as asked for. Anything but ``os.urandom`` is for tests: who can repeat it can unmask.

No result depends on it, since masks cancel out."""


class secure(Privacy):
    """Secure aggregation: the server gets sums over clients and no client's own values."""

    threshold: Annotated[float, Field(gt=0.5, le=1)] = 0.67
    """Share of the clients, and of each one's neighbours, without whom there is no sum; the rest may leave at any time."""
    bits: Literal[32, 64] = 32
    """Size of an integer."""
    clip: PositiveFloat = 8.0
    """Largest magnitude of a value; one beyond it is refused."""
    fraction: NonNegativeInt | None = None
    """Fractional bits; None: as many as the number of clients leaves room for."""
    neighbours: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Mask with this many others, an even number, drawn by the server, rather than with all. Fewer cost less and hide less."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The integers' type, as in messages: unsigned, little-endian."""
        return np.dtype(f"<u{self.bits // 8}")

    def circle(self, clients: int) -> int:
        """A client and its neighbours, among ``clients``."""
        return clients if self.neighbours is None else min(self.neighbours + 1, clients)

    def least(self, size: int) -> int:
        """How many of ``size`` must stay: ceil(threshold size), and two, since a sum over one is no sum."""
        return max(2, math.ceil(self.threshold * size - 1e-9))

    def enough(self, stayed: Array) -> None:
        """Raise ``PrivacyError`` if too few sent masked values; ``stayed`` bool ``[clients]`` in the order of the server's ring."""
        size, least = len(stayed), self.least(len(stayed))
        came = int(stayed.sum())
        if came < least:
            raise PrivacyError(
                f"secure.threshold: only {came} of {size} clients sent masked values, needed are {least}; nothing was revealed"
            )
        circle = self.circle(size)
        if circle == size:
            return
        around = np.sum([np.roll(stayed, step) for step in range(-(circle // 2), circle // 2 + 1)], axis=0)
        thin = stayed & (around < self.least(circle))
        if thin.any():
            raise PrivacyError(
                f"secure.threshold: only {around[thin].min()} of {circle} neighbours sent masked values around a client, "
                f"needed are {self.least(circle)}; nothing was revealed"
            )

    def client(self, number: int, clients: int, entropy: Entropy = os.urandom) -> Client:
        """One of ``clients`` clients; needs the extra ``privacy``."""
        self.require("cryptography", "Crypto")
        from hanse.privacy.protocol import Client

        return Client(self, number, clients, entropy)

    def server(self, clients: int, length: int, entropy: Entropy = os.urandom) -> Server:
        """The server for vectors of ``length`` integers; needs the extra ``privacy``."""
        self.require("cryptography", "Crypto")
        from hanse.privacy.protocol import Server

        return Server(self, clients, length, entropy)

    def fixed(self, clients: int, heaviest: float = 1.0) -> Fixed:
        """The numbers for sums over up to ``clients`` clients of weights up to ``heaviest``; raises ``ConfigError`` if none fit."""
        room = 2 ** (self.bits - 1) - 1
        fits = [f for f in range(2 * self.bits) if clients * round(self.clip * 2**f) <= room]
        fraction = max(fits, default=-1) if self.fraction is None else self.fraction
        if fraction not in fits:
            field = "clip" if self.fraction is None else "fraction"
            raise ConfigError(
                f"secure.{field}: {getattr(self, field)} is not allowed: sums over {clients} clients of values up to {self.clip} "
                f"would overflow {self.bits} bits"
            )
        return Fixed(self.dtype, fraction, self.clip, heaviest)

    def traffic(self, clients: int, length: int) -> tuple[int, int]:
        """Bytes a client receives and sends when nobody leaves, 4 for every client that a message names.

        The ``length`` integers apart that is 84 bytes sent and 137 received for each neighbour, and 105 once.
        """
        peers = self.circle(clients) - 1
        up = 64 + peers * (4 + 60) + 16 + length * self.dtype.itemsize + (peers + 1) * (4 + 16)
        down = peers * (4 + 64) + peers * (4 + 60) + (peers + 1) * (4 + 1)
        return down, up


@dataclass(frozen=True)
class Fixed:
    """Real numbers as integers modulo a power of two, such that their sum cannot overflow: see ``secure.fixed``."""

    dtype: np.dtype[Any]
    fraction: int
    clip: float
    heaviest: float

    def encode(self, sums: Mapping[str, Tensor], weight: Tensor) -> Array:
        """``weight_i v_i`` of each name ``[C, P_name]``, after the weight ``[C]`` itself, as integers ``[C, 1 + sum of P_name]``.

        All in units of ``heaviest``. Raises ``PrivacyError`` where a value is beyond ``clip`` or a weight is beyond ``heaviest``.
        """
        share = weight.double().cpu() / self.heaviest
        if not bool(((share >= 0) & (share <= 1)).all()):
            raise PrivacyError(f"secure: a weight is beyond 0 to {self.heaviest}, the range that was agreed on")
        parts = [self._integers("weight", self.clip * share[:, None])]
        parts += [self._integers(name, share[:, None] * values.double().cpu()) for name, values in sums.items()]
        return np.concatenate(parts, 1)

    def decode(self, total: Array, sizes: Mapping[str, int]) -> tuple[Tensors, float]:
        """The sums ``[P_name]`` in float64 and the sum of the weights, from the sum of what ``encode`` gave."""
        signed = torch.from_numpy(total.view(f"<i{self.dtype.itemsize}").astype(np.int64))
        values = signed.double() * (self.heaviest / 2**self.fraction)
        if len(values) != 1 + sum(sizes.values()):
            raise PrivacyError(f"secure: a sum of {len(values)} entries does not fit the sizes {dict(sizes)}")
        weight, *parts = values.split([1, *sizes.values()])
        return dict(zip(sizes, parts, strict=True)), float(weight) / self.clip

    def _integers(self, name: str, values: Tensor) -> Array:
        largest = float(values.abs().max()) if values.numel() else 0.0
        if not largest <= self.clip:  # NaN too
            raise PrivacyError(f"secure.clip: {name} has a value of magnitude {largest:.6g}, at most {self.clip} is allowed")
        integers: Array = (values * 2**self.fraction).round().long().numpy()
        return integers.astype(self.dtype)
