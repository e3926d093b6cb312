"""Rankings: a permutation in as few bits as its numbers need."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hanse.codecs.base import Sending
from hanse.codecs.chain import Load, Quantise
from hanse.codecs.coders import width
from hanse.core.errors import CodecError

BLOCK = 1 << 13
"""Entries whose bits are spread out together; a multiple of 8, so that a block ends with a byte."""


def reputations(values: Tensor) -> Tensor:
    """At what place of its row each entry stands from the lowest to the highest, int64 ``[..., n]``: the argsort of the argsort.

    Of equal entries the first is the lower; what is not a number is the highest. A permutation of 0 to n - 1 stays as it is.
    """
    order = values.argsort(dim=-1, stable=True)
    place = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)


class ranks(Quantise):
    """Of each layer, or of the vector, the order of its n entries: ``reputations``, in ``ceil(log2 n)`` bits an entry.

    As federated ranking learning sends (Mozaffari, Shejwalkar, Houmansadr, "Every Vote Counts", USENIX Security 2023, arXiv
    2110.04350). A permutation of 0 to n - 1 arrives without loss, of any other vector its order does, in the vector's type, which
    must be able to hold n - 1. The shortest code there is would take ``log2 n!``, at n = 100,000 15.2 bits an entry instead of 17,
    but arithmetic on numbers of n digits. The reader raises ``CodecError`` for what is not a permutation.
    """

    bare: ClassVar[bool] = False
    tells: ClassVar[bool] = True  # any row has an order, so none is looked at for what is not finite

    @property
    def levels(self) -> int:
        return 256

    def most(self, shape: tuple[int, ...]) -> int:
        n = torch.Size(shape).numel()
        return -(-n * width(max(0, n - 1)) // 8)

    def forward(self, load: Load, sending: Sending) -> Load:
        if load.places is not None or load.values.shape[1] != load.size:
            raise CodecError(f"ranks: of layer {load.name!r} all {load.size} entries are needed, not a selection")
        symbols = _packed(reputations(load.values).cpu().numpy(), width(max(0, load.size - 1)))
        values = load.values.new_zeros(symbols.shape)
        return replace(load, values=values, symbols=torch.from_numpy(symbols).to(values.device), levels=self.levels)

    def backward(self, load: Load) -> Load:
        assert load.symbols is not None
        found = _unpacked(load.symbols.cpu().numpy(), load.size, width(max(0, load.size - 1)))
        ranked = torch.from_numpy(found).to(load.values.device)
        if not torch.equal(ranked.sort(1).values, torch.arange(load.size, device=ranked.device).expand_as(ranked)):
            raise CodecError(f"ranks: layer {load.name!r} is not a permutation of 0 to {load.size - 1}")
        return replace(load, values=ranked.to(load.values), symbols=None, levels=0, table=None)


def _packed(numbers: np.ndarray, each: int) -> np.ndarray:
    """int64 ``[C, n]`` in ``each`` bits a number, lowest first: uint8 ``[C, ceil(n each / 8)]``."""
    clients, n = numbers.shape
    packed = np.empty((clients, -(-n * each // 8)), np.uint8)
    for at in range(0, n, BLOCK):
        bits = (numbers[:, at : at + BLOCK, None] >> np.arange(each)) & 1
        part = np.packbits(bits.astype(np.uint8).reshape(clients, -1), axis=1, bitorder="little")
        packed[:, at * each // 8 :][:, : part.shape[1]] = part
    return packed


def _unpacked(packed: np.ndarray, n: int, each: int) -> np.ndarray:
    """The ``n`` numbers of each row, int64 ``[C, n]``; raises ``CodecError`` where bits are left over."""
    numbers = np.empty((len(packed), n), np.int64)
    for at in range(0, n, BLOCK):
        here = min(BLOCK, n - at)
        part = packed[:, at * each // 8 :][:, : -(-here * each // 8)]
        bits = np.unpackbits(part, axis=1, bitorder="little")
        if bits[:, here * each :].any():
            raise CodecError("the bits after the last are not zero")
        numbers[:, at : at + here] = bits[:, : here * each].reshape(len(packed), here, each) @ (1 << np.arange(each))
    return numbers
