"""Named views of a flat vector.

A model is one vector of P numbers; C clients are a ``[C, P]`` matrix. A layout says which slice of the last axis is which named
tensor, so that ``views`` of a vector are the model's parameters and ``views`` of a matrix are C stacked models, without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hanse.core.errors import ConfigError


class Entry(NamedTuple):
    """One named tensor: its place is ``vector[..., start : start + size]``."""

    name: str
    shape: tuple[int, ...]
    start: int
    size: int


class Layout:
    """The order, shapes and places of named tensors in a flat vector of ``size`` numbers."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        entries, start = [], 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            entries.append(Entry(name, tuple(shape), start, size))
            start += size
        self.entries, self.size = tuple(entries), start
        self.sizes = [e.size for e in entries]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """``[..., P]`` to named views ``[..., *shape]`` that share its memory."""
        lead = flat.shape[:-1]
        return {
            e.name: part.view((*lead, *e.shape))
            for e, part in zip(self.entries, flat.split_with_sizes(self.sizes, -1), strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor], lead: tuple[int, ...] = ()) -> Tensor:
        """Named tensors ``[*lead, *shape]`` to a new ``[*lead, P]``; raises ``ConfigError`` on a missing name or a wrong shape."""
        for e in self.entries:
            if e.name not in tensors or tuple(tensors[e.name].shape) != (*lead, *e.shape):
                got = tuple(tensors[e.name].shape) if e.name in tensors else "nothing"
                raise ConfigError(f"weights[{e.name!r}]: got {got}, expected {(*lead, *e.shape)}")
        if not self.entries:
            return torch.zeros(*lead, 0)
        return torch.cat([tensors[e.name].detach().reshape(*lead, e.size) for e in self.entries], -1)


def select(module: nn.Module, chosen: Iterable[str]) -> set[str]:
    """Names of the parameters and buffers that ``chosen`` picks: name patterns (``head.*``) or module types (``BatchNorm2d``).

    Raises ``ConfigError`` when a pattern picks nothing, with what there is.
    """
    owners = {}
    for prefix, part in module.named_modules():
        for name, _ in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            owners[f"{prefix}.{name}" if prefix else name] = type(part).__name__
    picked: set[str] = set()
    for pattern in chosen:
        hits = {n for n, kind in owners.items() if kind == pattern or fnmatchcase(n, pattern)}
        if not hits:
            there = f"names: {', '.join(owners)}; types: {', '.join(sorted({*owners.values()}))}"
            raise ConfigError(f"selection: {pattern!r} matches no tensor; {there}")
        picked |= hits
    return picked
