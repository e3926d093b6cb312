"""Dropout whose mask is a function of (client, round, step, site) instead of a global generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from hanse.core.streams import philox

_place: ContextVar[tuple[Tensor, int, int]] = ContextVar("place")
_KEY = (0x0D0F, 0x5EED)


@contextmanager
def dropout_at(client: Tensor, round: int, step: int) -> Iterator[None]:
    """Masks inside the block belong to ``client`` (an int64 scalar, under ``vmap`` one per client) at this round and step."""
    token = _place.set((client, round, step))
    try:
        yield
    finally:
        _place.reset(token)


class KeyedDropout(nn.Module):
    """Drop with probability ``p`` and scale the rest by ``1 / (1 - p)``; two passes of one step drop the same units."""

    def __init__(self, p: float, site: int) -> None:
        super().__init__()
        self.p, self.site = p, site

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        client, round, step = _place.get()
        block = torch.arange(-(-x.numel() // 4), device=x.device)
        site = torch.full_like(block, step * 0x10000 + self.site)
        words = philox(client.to(x.device) + 0 * block, torch.full_like(block, round), block, site, _KEY)
        u = torch.stack(words, -1).flatten()[: x.numel()].view(x.shape)
        return x * (u >= self.p * 2**32) / (1 - self.p)


def with_keyed_dropout(module: nn.Module) -> nn.Module:
    """Replace every ``nn.Dropout`` in place."""
    for site, (name, part) in enumerate(list(module.named_modules())):
        if isinstance(part, nn.Dropout):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, KeyedDropout(part.p, site))
    return module
