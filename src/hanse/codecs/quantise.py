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
        symbols, table = _quantised(load)
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
        symbols, scale = _quantised(load)
        blocks, unit = self._blocks(symbols), scale.reshape(-1, 1)
        values = pieces(blocks, unit.dtype, lambda i, j: self.ratios(blocks[i, j], unit).mul_(unit[i]))
        return replace(load, values=values.view(len(symbols), -1)[:, : symbols.shape[1]], symbols=None, levels=0, table=None)

    def _blocks(self, x: Tensor) -> Tensor:
        """``[C, m]`` cut into blocks, ``[C * blocks, width]``, the last one filled up with zeros."""
        width = self.block or max(1, x.shape[1])
        return _padded(x, width).reshape(-1, width)


def _quantised(load: Load) -> tuple[Tensor, Tensor]:
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
        symbols, scale = _quantised(load)
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
        symbols, scale = _quantised(load)
        return replace(load, values=(symbols.to(scale.dtype) - 1) * scale, symbols=None, levels=0, table=None)


class kmeans(Quantise):
    """A codebook of ``centres`` numbers by k-means on a line.

    It starts from one mean for each sign, splits the clusters with the largest errors until there are enough, and moves borders and
    means by Lloyd's steps in between; so the error is never more than that of the two means (Lloyd, "Least squares quantization in
    PCM", 1982; the splitting is that of Linde, Buzo and Gray, 1980).
    """

    centres: Annotated[int, Field(ge=1, le=256)] = 2
    """Numbers in the codebook."""

    @property
    def levels(self) -> int:
        return self.centres

    def columns(self, count: int) -> int:
        return self.centres

    def forward(self, load: Load, sending: Sending) -> Load:
        x = load.values
        table, borders = codebook(masked(load, torch.inf), load.lengths.to(x.device), self.centres)
        symbols = torch.searchsorted(borders, x.double().contiguous(), right=True).to(torch.uint8)
        symbols = symbols if load.there is None else symbols * load.there
        return replace(load, symbols=symbols, levels=self.centres, table=table.to(x.dtype))

    def backward(self, load: Load) -> Load:
        symbols, table = _quantised(load)
        return replace(load, values=table.gather(1, symbols.long()), symbols=None, levels=0, table=None)


ONE_BY_ONE = 16
"""Clusters up to which they are split one at a time, the worst first; more are split as many as there are at once, for speed."""
STEPS = 20
"""Most of Lloyd's steps between two splits."""


def codebook(x: Tensor, counts: Tensor, centres: int) -> tuple[Tensor, Tensor]:
    """Centres ``[C, k]``, rising, and the borders between them ``[C, k - 1]``, double precision, of the first ``counts`` numbers of
    each row ``[C, m]``, of which the rest is infinite.
    """
    x = x.double().sort(1).values
    there = torch.arange(x.shape[1], device=x.device) < counts[:, None]
    finite = torch.where(there, x, 0)
    sums, squares = (_integral(t, finite < 0) for t in (finite, finite.square()))
    zero, end = torch.zeros_like(counts)[:, None], counts[:, None]
    cuts = torch.cat([zero, end], 1)
    if centres > 1:
        middle = torch.searchsorted(x, torch.zeros(len(x), 1, dtype=x.dtype, device=x.device))
        one_sign = (middle == 0) | (middle == end)
        middle = torch.where(one_sign, torch.searchsorted(x, _means(x, sums, cuts)), middle)
        cuts = torch.cat([zero, middle, end], 1)
    while True:
        cuts, means = _lloyd(x, sums, cuts)
        have = means.shape[1]
        if have == centres:
            means = _means(x, sums, _distinct(x, there, cuts))
            return means, (means[:, 1:] + means[:, :-1]) / 2
        size = cuts.diff(dim=1)
        error = squares.gather(1, cuts[:, 1:]) - squares.gather(1, cuts[:, :-1]) - means.square() * size
        error = error.masked_fill(_single(x, cuts), -torch.inf)
        new = 1 if have < ONE_BY_ONE else min(have, centres - have)
        split = error.argsort(dim=1, descending=True, stable=True)[:, :new]  # the same ones whoever else is there
        middle = torch.searchsorted(x, means.gather(1, split)).clamp(cuts.gather(1, split), cuts.gather(1, split + 1))
        cuts = torch.cat([cuts, middle], 1).sort(1).values


def _integral(x: Tensor, negative: Tensor) -> Tensor:
    """Sums of ``x`` from zero outwards, ``[C, m + 1]``: their differences are then no less exact where numbers are small."""
    up, down = torch.where(negative, 0, x), torch.where(negative, x, 0).flip(1)
    up, down = (torch.nn.functional.pad(t.cumsum(1), (1, 0)) for t in (up, down))
    return up - down.flip(1)


def _single(x: Tensor, cuts: Tensor) -> Tensor:
    """Which clusters of the sorted ``x`` hold at most one number, however often, bool ``[C, k]``."""
    if not x.shape[1]:
        return torch.ones_like(cuts[:, 1:], dtype=torch.bool)
    first, last = (x.gather(1, t.clamp(0, x.shape[1] - 1)) for t in (cuts[:, :-1], cuts[:, 1:] - 1))
    return (first == last) | (cuts.diff(dim=1) == 0)


def _distinct(x: Tensor, there: Tensor, cuts: Tensor) -> Tensor:
    """``cuts``, or a cluster for each number of the sorted ``x`` in the rows where there are enough of them."""
    new = there & (torch.nn.functional.pad(x, (1, 0), value=-torch.inf)[:, :-1] != x)
    which = new.cumsum(1)
    enough = which[:, -1:] < cuts.shape[1] if x.shape[1] else torch.zeros_like(cuts[:, :1], dtype=torch.bool)
    which = torch.where(new, which - 1, cuts.shape[1] - 1).clamp(max=cuts.shape[1] - 1)
    at = torch.arange(x.shape[1], device=x.device).expand(which.shape)
    starts = cuts[:, -1:].expand(cuts.shape).scatter_reduce(1, which, torch.where(new, at, at + x.shape[1]), "amin")
    return torch.where(enough, torch.cat([starts[:, :-1], cuts[:, -1:]], 1), cuts)


def _lloyd(x: Tensor, sums: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Borders between clusters of the sorted ``x``, ``[C, k + 1]``, moved until they stay, and the clusters' means ``[C, k]``."""
    for _ in range(STEPS):
        means = _means(x, sums, cuts)
        moved = torch.searchsorted(x, (means[:, 1:] + means[:, :-1]) / 2)
        moved = torch.cat([cuts[:, :1], torch.minimum(moved, cuts[:, -1:]), cuts[:, -1:]], 1)
        if torch.equal(moved, cuts):
            break
        cuts = moved
    return cuts, _means(x, sums, cuts)


def _means(x: Tensor, sums: Tensor, cuts: Tensor) -> Tensor:
    """Mean of each cluster; of an empty one, the number at its border."""
    size = cuts.diff(dim=1)
    total = sums.gather(1, cuts[:, 1:]) - sums.gather(1, cuts[:, :-1])
    if not x.shape[1]:
        return torch.zeros_like(total)
    border = x.gather(1, cuts[:, :-1].clamp(max=x.shape[1] - 1))
    border = torch.where(torch.isfinite(border), border, x.gather(1, (cuts[:, -1:] - 1).clamp(min=0)))
    return torch.where(size > 0, total / size.clamp(min=1), torch.where(torch.isfinite(border), border, 0))
