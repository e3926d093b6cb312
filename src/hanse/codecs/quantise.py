"""Quantisation: a symbol of a few bits instead of each number, and a small table that says what symbols mean.

Sums are taken in double precision and in a fixed order, so that a vector gives the same table alone and beside others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from hanse.codecs.base import Sending
from hanse.codecs.chain import Load, Quantise
from hanse.codecs.sparse import words

STRIP = 1024
PIECE = 31 << 10
"""Numbers that are worked on together: they stay in a core's cache, and are so few that torch does not share each operation on them
out among threads, which takes long where another process holds one of the cores."""


def row_sums(x: Tensor) -> Tensor:
    """Sums of the rows ``[C, m]`` in double precision, ``[C]``, in an order that depends on m alone."""
    clients, count = x.shape
    if not count:
        return x.double().sum(1)
    whole = max(STRIP, PIECE // max(1, clients) // STRIP * STRIP)
    parts = [_padded(x[:, at : at + whole].double(), STRIP).view(clients, -1, STRIP).sum(2) for at in range(0, count, whole)]
    return torch.cat(parts, 1).cumsum(1)[:, -1]


def _padded(x: Tensor, width: int) -> Tensor:
    """Rows filled up with zeros to a multiple of ``width``."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % width)) if x.shape[1] % width else x


def pieces(like: Tensor, dtype: torch.dtype, make: Callable[[slice, slice], Tensor]) -> Tensor:
    """``[C, m]`` of numbers that ``make`` gives for some rows and columns at a time, few enough to stay in a core's cache."""
    clients, count = like.shape
    if clients * count <= PIECE:
        return make(slice(None), slice(None)).to(dtype)
    out = torch.empty(clients, count, dtype=dtype, device=like.device)
    rows = max(1, PIECE // max(1, count))
    for i in (slice(at, at + rows) for at in range(0, clients, rows)):
        for j in (slice(at, at + PIECE) for at in range(0, count, PIECE)):
            out[i, j] = make(i, j)
    return out


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of each row, ``[C, 1]``."""
    if x.shape[1] > PIECE:  # torch's reduction of a few long rows is four times as slow as that of one vector
        ends = [row.aminmax() for row in x]
        return torch.stack([e.min for e in ends])[:, None], torch.stack([e.max for e in ends])[:, None]
    low, high = x.aminmax(dim=1)
    return low[:, None], high[:, None]


def masked(load: Load, fill: float) -> Tensor:
    """The values, with ``fill`` in the places of those that are not sent."""
    return load.values if load.there is None else torch.where(load.there, load.values, fill)


def nearest(x: Tensor, low: Tensor, unit: Tensor) -> Tensor:
    """``(x - low) / unit`` rounded, uint8 ``[C, m]``; ``low`` and ``unit`` are ``[C, 1]``."""
    if x.device.type != "cpu":
        return (x - low).div_(unit).round_().to(torch.uint8)
    values, begin, width = x.numpy(), low.numpy(), unit.numpy()  # whose calls cost a fraction of torch's on pieces of this size
    symbols = np.empty(values.shape, np.uint8)
    rows = max(1, PIECE // max(1, values.shape[1]))
    with np.errstate(all="ignore"):  # what is not finite travels as it is
        for i in (slice(at, at + rows) for at in range(0, len(values), rows)):
            for j in (slice(at, at + PIECE) for at in range(0, values.shape[1], PIECE)):
                here = values[i, j] - begin[i]
                here /= width[i]
                np.rint(here, out=here)
                symbols[i, j] = here
    return torch.from_numpy(symbols)


class cast(Quantise):
    """Shorter floating-point numbers: half precision, or bfloat16 with the range of float32."""

    to: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    """Type that travels; numbers too large for float16 make the layer travel as it is."""

    def sent_as(self, dtype: torch.dtype) -> torch.dtype:
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[self.to]

    def forward(self, load: Load, sending: Sending) -> Load:
        return load

    def backward(self, load: Load) -> Load:
        return load


class uniform(Quantise):
    """Evenly spaced levels from the smallest to the largest number.

    ``stochastic``: up or down at random so that the mean over draws is the number itself (Alistarh et al., "QSGD", NeurIPS 2017,
    arXiv 1610.02132, with the range instead of the norm).
    """

    bits: Annotated[int, Field(ge=1, le=8)] = 8
    """Bits a number."""
    stochastic: bool = False
    """Round at random, by the message's seed."""
    tells: ClassVar[bool] = True

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def columns(self, count: int) -> int:
        return 2

    def forward(self, load: Load, sending: Sending) -> Load:
        x, top = load.values, self.levels - 1
        if not x.shape[1]:
            return replace(load, symbols=x.to(torch.uint8), levels=self.levels, table=x.new_zeros(len(x), 2))
        if load.there is None:
            low, high = _range(x)
        else:
            low, high = masked(load, torch.inf).amin(1, keepdim=True), masked(load, -torch.inf).amax(1, keepdim=True)
            low, high = (torch.where(torch.isfinite(t), t, 0) for t in (low, high))
        low = low + 0.0  # of -0 and 0, which are equal, either may be found
        step = (high - low) / top
        exact = (step == 0) | (step >= torch.finfo(step.dtype).tiny)  # else quotients may exceed the top level
        step = torch.where(torch.isfinite(step * top) & exact, step, torch.inf)  # and so travels as it is
        unit = torch.where(step > 0, step, 1)
        if self.stochastic:
            noise = (words(sending.seeds.to(x.device), load.name, x.shape[1]).to(x.dtype) + 0.5) / 2**32 - 0.5
            symbols = ((x - low) / unit).add_(noise).round_().clamp_(0, top).to(torch.uint8)
        else:
            symbols = nearest(x, low, unit)
        return replace(load, symbols=symbols, levels=self.levels, table=torch.cat([low, step], 1))

    def backward(self, load: Load) -> Load:
        symbols, table = quantised(load)
        low, step = table[:, :1], table[:, 1:]
        values = pieces(symbols, low.dtype, lambda i, j: symbols[i, j].to(low.dtype).mul_(step[i]).add_(low[i]))
        return replace(load, values=values, symbols=None, levels=0, table=None)


class Blocks(Quantise):
    """Base of the quantisers that scale each block of numbers by its largest magnitude."""

    abstract: ClassVar[bool] = True
    block: PositiveInt | None = None
    """Numbers to a scale; None: one scale for all."""
    tells: ClassVar[bool] = True

    def symbols(self, ratio: Tensor) -> Tensor:
        """Symbols of numbers from -1 to 1, uint8."""
        raise TypeError(f"{type(self).__name__} does not define symbols")

    def ratios(self, symbols: Tensor, like: Tensor) -> Tensor:
        """What symbols mean, of the type of ``like``."""
        raise TypeError(f"{type(self).__name__} does not define ratios")

    def columns(self, count: int) -> int:
        return -(-count // (self.block or max(1, count)))

    def forward(self, load: Load, sending: Sending) -> Load:
        x = masked(load, 0)
        blocks = self._blocks(x)
        low, high = _range(blocks)
        scale = torch.maximum(-low, high).abs()  # of -0 and 0, which are equal, either may be found
        unit = torch.where(scale > 0, scale, 1)
        symbols = pieces(blocks, torch.uint8, lambda i, j: self.symbols(blocks[i, j] / unit[i]))
        return replace(load, symbols=symbols.view(len(x), -1)[:, : x.shape[1]], levels=self.levels, table=scale.view(len(x), -1))

    def backward(self, load: Load) -> Load:
        symbols, scale = quantised(load)
        blocks, unit = self._blocks(symbols), scale.reshape(-1, 1)
        values = pieces(blocks, unit.dtype, lambda i, j: self.ratios(blocks[i, j], unit).mul_(unit[i]))
        return replace(load, values=values.view(len(symbols), -1)[:, : symbols.shape[1]], symbols=None, levels=0, table=None)

    def _blocks(self, x: Tensor) -> Tensor:
        """``[C, m]`` cut into blocks, ``[C * blocks, width]``, the last one filled up with zeros."""
        width = self.block or max(1, x.shape[1])
        return _padded(x, width).reshape(-1, width)


def quantised(load: Load) -> tuple[Tensor, Tensor]:
    """Symbols and table of a load that has been quantised."""
    assert load.symbols is not None and load.table is not None
    return load.symbols, load.table


class int8(Blocks):
    """255 evenly spaced levels around zero, which is one of them."""

    @property
    def levels(self) -> int:
        return 255

    def symbols(self, ratio: Tensor) -> Tensor:
        return (ratio * 127).round_().add_(127).to(torch.uint8)

    def ratios(self, symbols: Tensor, like: Tensor) -> Tensor:
        return symbols.to(like.dtype).sub_(127).div_(127)


class nf4(Blocks):
    """Four bits whose levels hold equal shares of a normal distribution (Dettmers et al., "QLoRA", NeurIPS 2023, arXiv 2305.14314).

    The levels are those of its appendix E: eight quantiles from the negative half, nine from the positive one, zero once.
    """

    block: PositiveInt | None = 64
    """Numbers to a scale; None: one scale for all."""

    @property
    def levels(self) -> int:
        return 16

    def symbols(self, ratio: Tensor) -> Tensor:
        grid = torch.tensor(NF4, dtype=ratio.dtype, device=ratio.device)
        return torch.bucketize(ratio, (grid[1:] + grid[:-1]) / 2).to(torch.uint8)

    def ratios(self, symbols: Tensor, like: Tensor) -> Tensor:
        return torch.tensor(NF4, dtype=like.dtype, device=like.device)[symbols.long()]


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class sign(Quantise):
    """One bit: the sign, times the mean magnitude; zero counts as positive.

    Karimireddy, Rebjock, Stich, Jaggi: "Error Feedback Fixes SignSGD", ICML 2019, arXiv 1901.09847, their scaled sign.
    """

    @property
    def levels(self) -> int:
        return 2

    def columns(self, count: int) -> int:
        return 1

    def forward(self, load: Load, sending: Sending) -> Load:
        x = masked(load, 0)
        scale = row_sums(x.abs()) / load.lengths.to(x.device).clamp(min=1)
        return replace(load, symbols=(x >= 0).view(torch.uint8), levels=2, table=scale[:, None].to(x.dtype))

    def backward(self, load: Load) -> Load:
        symbols, scale = quantised(load)
        values = pieces(symbols, scale.dtype, lambda i, j: symbols[i, j].to(scale.dtype).mul_(2).sub_(1).mul_(scale[i]))
        return replace(load, values=values, symbols=None, levels=0, table=None)


class ternary(Quantise):
    """Minus, zero or plus one mean magnitude: zero is what is below ``threshold`` times the mean magnitude of all.

    Li, Zhang, Liu: "Ternary Weight Networks", arXiv 1605.04711, equation 6 for the threshold.
    """

    threshold: Annotated[float, Field(ge=0)] = 0.7
    """In mean magnitudes."""

    @property
    def levels(self) -> int:
        return 3

    def columns(self, count: int) -> int:
        return 1

    def forward(self, load: Load, sending: Sending) -> Load:
        x = masked(load, 0)
        magnitude = x.abs()
        mean = row_sums(magnitude) / load.lengths.to(x.device).clamp(min=1)
        large = magnitude > self.threshold * mean[:, None]
        scale = row_sums(magnitude * large) / large.sum(1).clamp(min=1)
        symbols = (x.sign() * large + 1).to(torch.uint8)
        return replace(load, symbols=symbols, levels=3, table=scale[:, None].to(x.dtype))

    def backward(self, load: Load) -> Load:
        symbols, scale = quantised(load)
        return replace(load, values=(symbols.to(scale.dtype) - 1) * scale, symbols=None, levels=0, table=None)
