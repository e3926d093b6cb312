"""Dropout whose mask is a function of (client, round, step, site) instead of a global generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from hanse.core.streams import MASK, philox

_key: ContextVar[Tensor] = ContextVar("dropout_key")


@contextmanager
def dropout_key(key: Tensor) -> Iterator[None]:
    """Set the key (int64 scalar, under ``vmap`` one per client) from which masks are drawn inside the block."""
    token = _key.set(key)
    try:
        yield
    finally:
        _key.reset(token)


class KeyedDropout(nn.Module):
    """Drop with probability ``p``, scaled by ``1 / (1 - p)``; two passes of one step drop the same units."""

    def __init__(self, p: float, site: int) -> None:
        super().__init__()
        self.p, self.site = p, site

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        key = _key.get()
        block = torch.arange(-(-x.numel() // 4), device=x.device)
        words = philox(block, (key & MASK) + 0 * block, (key >> 32) + 0 * block, torch.full_like(block, self.site), (0x0D0F, 0x5EED))
        u = torch.stack(words, -1).flatten()[: x.numel()].view(x.shape)
        return x * (u >= self.p * 2**32) / (1 - self.p)


def with_keyed_dropout(module: nn.Module) -> nn.Module:
    """Replace every ``nn.Dropout`` in place."""
    for site, (name, part) in enumerate(list(module.named_modules())):
        if isinstance(part, nn.Dropout):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, KeyedDropout(part.p, site))
    return module
