"""Counter-based random numbers: every draw is a function of (seed, purpose, client, round, position) and of nothing else.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written on int64 tensors
so that the draws of a thousand clients are one vectorised call, are the same on every device, and work under ``torch.vmap``.
No state is kept, so results cannot depend on the order or grouping in which clients run.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
# The products of two 32-bit words need 64 unsigned bits; int64 wraps to the same bits, so >> and & below recover the halves.


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words (any shapes that broadcast)."""
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + _W0) & MASK, (k1 + _W1) & MASK
    return c0, c1, c2, c3


@lru_cache(maxsize=4096)
def key(seed: int, purpose: str) -> tuple[int, int]:
    """The Philox key of a purpose."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


class Streams:
    """All random numbers of one run. ``purpose`` names the use, so that one more use never shifts another's numbers."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.device = seed, torch.device(device)
        self._generator = np.random.Generator(np.random.Philox(key=0))

    def words(self, purpose: str, clients: Tensor, round: Tensor | int, n: int, extra: Tensor | int = 0) -> Tensor:
        """Independent 32-bit words, int64 ``[len(clients), n]``.

        ``round`` and ``extra``, a fourth counter, are a number for all or one per client.
        """
        c0 = clients.to(self.device)[:, None]
        c1, c3 = (torch.as_tensor(v, device=self.device).view(-1, 1) for v in (round, extra))
        block = torch.arange(-(-n // 4), device=self.device)
        out = philox(c0, c1, block, c3, key(self.seed, purpose))
        return torch.stack([word.expand(len(clients), len(block)) for word in out], -1).flatten(1)[:, :n]

    def seeds(self, purpose: str, clients: Tensor, round: Tensor | int = 0) -> Tensor:
        """A number for each client and round to draw from by oneself, int64 ``[len(clients)]``; no two of a purpose are equal."""
        low, high = key(self.seed, purpose)
        return (clients | torch.as_tensor(round) << 32) ^ (low | high << 32) - (1 << 63)

    def uniform(self, purpose: str, clients: Tensor, round: Tensor | int = 0, n: int = 1, extra: Tensor | int = 0) -> Tensor:
        """float64 in the open interval (0, 1), ``[len(clients), n]``."""
        return (self.words(purpose, clients, round, n, extra).double() + 0.5) / 2**32

    def normal(self, purpose: str, clients: Tensor, round: Tensor | int = 0, n: int = 1) -> Tensor:
        """Standard normal float64 ``[len(clients), n]`` (Box-Muller)."""
        u = self.uniform(purpose, clients, round, 2 * n)
        return torch.sqrt(-2 * torch.log(u[:, :n])) * torch.cos(2 * math.pi * u[:, n:])

    def sample(self, purpose: str, population: int, k: int, round: int, extra: int = 0) -> Tensor:
        """``k`` distinct numbers below ``population``, uniformly drawn, sorted; for small ``k`` in time and memory of order k."""
        drawn = self._keyed(self._seed64(purpose, extra, round)).choice(population, k, replace=False, shuffle=False)
        drawn.sort()
        return torch.from_numpy(drawn).to(self.device)

    def _keyed(self, key: int) -> np.random.Generator:
        """``np.random.Generator(np.random.Philox(key=key))``, without asking the system for entropy that is then not used."""
        state = {"counter": np.zeros(4, np.uint64), "key": np.array([key, 0], np.uint64)}
        self._generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": state,
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator

    def numpy(self, purpose: str, client: int = 0, round: int = 0) -> np.random.Generator:
        """An ordinary NumPy generator for code that is not batched (partitioners, tasks)."""
        return np.random.Generator(np.random.Philox(self._seed64(purpose, client, round)))

    def torch(self, purpose: str, client: int = 0, round: int = 0) -> torch.Generator:
        """An ordinary torch generator for code that is not batched (initial weights, ``train_one``)."""
        return torch.Generator().manual_seed(self._seed64(purpose, client, round))

    def _seed64(self, purpose: str, client: int, round: int) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{purpose}/{client}/{round}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1
