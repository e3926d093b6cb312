"""Inner products of rows, chunk of columns by chunk.

Most robust rules need nothing of the rows but their inner products: they are linear combinations of rows whose coefficients follow
from distances and angles. So the rows ``[C, P]`` are read once for the Gram matrix ``[C, C]`` and once for the combination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
CHUNK = 1 << 19
"""Numbers in a chunk: 2 MB of float32, about a core's level-2 cache. With smaller ones operations are so short that threads spend
their time handing the interpreter's lock to each other: at a quarter of it Bulyan takes twice as long on two threads.
"""
LANES = 16
"""Into how many shares chunks are dealt, whatever the number of threads, so that this does not change the order of additions."""


def spread(work: Callable[[list[slice]], T], rows: Tensor) -> list[T]:
    """``work`` on each share of the chunks of columns of ``rows``, in their order, on as many threads as torch may use."""
    height, size = rows.shape
    # An accelerator wants fewer and larger pieces, and has no cache to fit.
    step = max(64, (CHUNK if rows.device.type == "cpu" else 256 * CHUNK) // max(1, height)) | 16  # powers of two share cache places
    spans = [slice(start, min(start + step, size)) for start in range(0, size, step)]
    share = max(1, -(-len(spans) // LANES))
    shares = [spans[i : i + share] for i in range(0, len(spans), share)]
    threads = torch.get_num_threads()
    if threads == 1 or len(shares) < 2 or rows.device.type != "cpu":
        return list(map(work, shares))
    try:  # a chunk is too little for several threads, so each thread takes chunks of its own
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, shares))
    finally:
        torch.set_num_threads(threads)  # MKL has one number for all threads


@contextmanager
def one_thread() -> Iterator[None]:
    """For decompositions of p x p: two threads on them wait for each other, on busy cores longer than everything else takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What rows of ``dtype`` are computed in: float64 as it is, all else in float32."""
    return torch.promote_types(dtype, torch.float32)


def taken(rows: Tensor, used: Tensor | None) -> Tensor:
    """The rows ``used`` int64 ``[p]``; None: all, without a copy. Plain indexing takes twice as long."""
    return rows if used is None else rows.index_select(0, used)


def finite(rows: Tensor) -> Tensor:
    """Which rows ``[C, P]`` have neither NaN nor infinity, bool ``[C]``."""

    def some(spans: list[slice]) -> Tensor:
        return torch.stack([rows[:, span].isfinite().all(1) for span in spans]).all(0)

    return torch.stack([rows.new_ones(len(rows), dtype=torch.bool), *spread(some, rows)]).all(0)


def gram(rows: Tensor, reference: int | None = None, used: Tensor | None = None, exact: bool = False) -> Tensor:
    """Inner products of the rows ``used`` int64 ``[p]`` (None: all) of ``[C, P]``: float64 ``[p, p]``, symmetric.

    With ``reference`` they are those of the differences from this row of the C.

    Products of float32 are added up in float32 inside a chunk and in float64 across chunks; ``exact`` does all of it in float64,
    where the square of a float32 does not overflow. Float64 rows always are.
    """
    kind = torch.float64 if exact else wide(rows.dtype)

    p = len(rows) if used is None else len(used)

    def some(spans: list[slice]) -> Tensor:
        total = rows.new_zeros(p, p, dtype=torch.float64)
        for span in spans:
            x = taken(rows[:, span], used).to(kind)
            if reference is not None:
                x = x - rows[reference, span].to(kind)
            total += x @ x.T
        return total

    return symmetric(sum(spread(some, rows), rows.new_zeros(p, p, dtype=torch.float64)))


def near(rows: Tensor, used: Tensor | None = None, columns: int = 1024) -> int | None:
    """The row of those ``used`` to subtract before distances are taken from inner products; None if rows are about as far apart as
    they are long.

    Models differ far less than they are long, and the difference of two long inner products has few digits left. The row is the one
    in the middle of the others (least median distance) on some thousand columns, so that a row far off does not spoil the rest.
    """
    sample = rows[:, :: max(1, rows.shape[1] // columns)].double()
    sample = taken(sample, used)
    between = torch.cdist(sample, sample, compute_mode="donot_use_mm_for_euclid_dist").square()
    middle = between.nan_to_num(torch.inf).median(1).values
    best = int(middle.argmin())
    if bool(middle[best] > 0.01 * sample[best].square().sum()):
        return None
    return best if used is None else int(used[best])


def symmetric(gram: Tensor) -> Tensor:
    """Inner products without the rounding that makes ``<x, y>`` and ``<y, x>`` differ, and so two rows nearest to each other."""
    return (gram + gram.T) / 2


def distances(gram: Tensor) -> Tensor:
    """Squared distances ``[p, p]`` from inner products, of rows or of their differences from any vector."""
    length = gram.diagonal()
    return (length[:, None] + length - 2 * gram).clamp_min(0)


def away(gram: Tensor, c: Tensor) -> Tensor:
    """Distances ``[p]`` of the rows from their combination ``sum_i c_i x_i``."""
    inside = gram @ c
    return (gram.diagonal() - 2 * inside + c @ inside).clamp_min(0).sqrt()
