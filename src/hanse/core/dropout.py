"""Dropout whose mask is a function of (seed, client, round, step, site) instead of a global generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from hanse.core.streams import key, philox

_place: ContextVar[tuple[Tensor, Tensor, int, int]] = ContextVar("place")


@contextmanager
def dropout_at(client: Tensor, round: Tensor, step: int, seed: int) -> Iterator[None]:
    """Masks inside the block belong to ``client`` at this ``round`` (int64 scalars, under ``vmap`` one per client) and step."""
    token = _place.set((client, round, step, seed))
    try:
        yield
    finally:
        _place.reset(token)


class KeyedDropout(nn.Module):
    """Drop with probability ``p`` and scale the rest by ``1 / (1 - p)``; two passes of one step drop the same units.

    ``channels``: drop whole channels of ``[B, C, ...]``, as ``Dropout2d`` does.
    """

    def __init__(self, p: float, site: int, channels: bool = False) -> None:
        super().__init__()
        self.p, self.site, self.channels = p, site, channels

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if self.channels else x.shape
        client, round, step, seed = _place.get()
        block = torch.arange(-(-torch.Size(shape).numel() // 4), device=x.device)
        site = torch.full_like(block, step * 0x10000 + self.site)
        words = philox(client.to(x.device) + 0 * block, round.to(x.device) + 0 * block, block, site, key(seed, "dropout"))
        u = torch.stack(words, -1).flatten()[: torch.Size(shape).numel()].view(shape)
        return x * (u >= self.p * 2**32) / (1 - self.p)


def unkeyed(module: nn.Module) -> list[str]:
    """Names of the parts whose dropout draws from torch's global generator and cannot be replaced."""
    kinds = nn.MultiheadAttention, nn.RNNBase, nn.AlphaDropout, nn.FeatureAlphaDropout
    rates = {n: getattr(m, "dropout", getattr(m, "p", 0.0)) for n, m in module.named_modules() if isinstance(m, kinds)}
    return [name for name, rate in rates.items() if rate]


def with_keyed_dropout(module: nn.Module) -> nn.Module:
    """Replace every ``nn.Dropout``, ``Dropout1d``, ``Dropout2d`` and ``Dropout3d`` in place; each place draws its own masks."""
    for site, (name, part) in enumerate(list(module.named_modules(remove_duplicate=False))):
        if isinstance(part, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, KeyedDropout(part.p, site, not isinstance(part, nn.Dropout)))
    return module
