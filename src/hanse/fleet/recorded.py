"""Traces that were measured, read from a file."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hanse.core.errors import DataError
from hanse.fleet.population import Population
from hanse.fleet.traces import Piecewise

HEADER = ["client", "time", "online", "speed"]


class _Rows(NamedTuple):
    """A file's rows, in the order of clients; after the last one a row at inf that says where there is none."""

    clients: Tensor
    """Clients that have rows, rising, then -1; int64 ``[U + 1]``."""
    begin: Tensor
    """First row of each, int64 ``[U + 1]``."""
    size: Tensor
    """Number of rows of each, int64 ``[U + 1]``; 0 at the end."""
    time: Tensor
    """float64 ``[R + 1]``."""
    speed: Tensor
    """float64 ``[R + 1]``; 0 is away."""


class recorded(Piecewise):
    """Presence and speed as recorded in a CSV file with the header ``client,time,online,speed``.

    A row says that from ``time`` (seconds, rising for every client) on, ``client`` is there (``online`` 1, with ``speed`` times its
    full speed, above 0) or away (``online`` 0). Before its first row a client is there at full speed; the last row holds for ever.
    A client without rows is always there, and rows of clients that are not registered are ignored.

    Using it raises ``DataError`` with file and line when the file cannot be read as such.
    """

    file: str
    """Path of the file."""

    def piece(self, population: Population, clients: Tensor, time: Tensor) -> Tensor:
        rows, begin, count = self._find(clients)
        low, high = torch.zeros_like(count), count.clone()
        while (low < high).any():
            middle = (low + high) // 2
            past = (low < high) & (rows.time[begin + middle] <= time)
            low, high = torch.where(past, middle + 1, low), torch.where(past, high, middle)
        return low

    def pieces(self, population: Population, clients: Tensor, first: Tensor, n: int) -> tuple[Tensor, Tensor]:
        rows, begin, count = self._find(clients)
        number = first[:, None] + torch.arange(n + 1)
        row = torch.where((number > 0) & (number <= count[:, None]), begin[:, None] + number - 1, len(rows.time) - 1)
        edges = torch.where(number > 0, rows.time[row], 0.0)
        return edges, torch.where(number > 0, rows.speed[row], 1.0)[:, :-1]

    def _find(self, clients: Tensor) -> tuple[_Rows, Tensor, Tensor]:
        """The file's rows, and of each client the first one and their number."""
        try:
            rows = _read(self.file, os.stat(self.file).st_mtime_ns)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{self.file}: cannot be read: {error}") from None
        place = torch.searchsorted(rows.clients[:-1], clients)
        place = torch.where(rows.clients[place] == clients, place, len(rows.clients) - 1)
        return rows, rows.begin[place], rows.size[place]


@lru_cache(maxsize=4)
def _read(file: str, changed: int) -> _Rows:
    """Read a file; ``changed``, the time of its last change, has it read again when it is another."""
    with open(file, newline="", encoding="utf-8") as lines:
        table = np.array(list(_parse(file, csv.reader(lines))), dtype=np.float64).reshape(-1, 3)
    table = table[np.argsort(table[:, 0], kind="stable")]
    clients, begin, count = np.unique(table[:, 0].astype(np.int64), return_index=True, return_counts=True)
    ends = (np.append(clients, -1), np.append(begin, 0), np.append(count, 0))
    rest = (np.append(table[:, 1], np.inf), np.append(table[:, 2], 0.0))
    return _Rows(*map(torch.from_numpy, ends), *map(torch.from_numpy, rest))


def _parse(file: str, lines: Iterator[list[str]]) -> Iterator[tuple[int, float, float]]:
    """Client, time and speed of every row; raises ``DataError`` with the line of the first that is wrong."""
    if next(lines, None) != HEADER:
        raise DataError(f"{file}, line 1: the header has to be {','.join(HEADER)}")
    latest: dict[int, float] = {}
    for number, cells in enumerate(lines, start=2):
        try:
            who, when, there, fast = cells
            client, time, speed = int(who), float(when), float(fast)
        except ValueError:
            raise DataError(f"{file}, line {number}: {','.join(cells)!r} is not client,time,online,speed in numbers") from None
        if not (0 <= client < 1 << 32 and 0 <= time < math.inf):
            raise DataError(f"{file}, line {number}: client {client} at {time:g} s is not allowed: both have to be from 0 up")
        if time <= latest.get(client, -1.0):
            raise DataError(f"{file}, line {number}: {time:g} s of client {client} is not after {latest[client]:g} s")
        if there not in ("0", "1"):
            raise DataError(f"{file}, line {number}: online {there!r} is not allowed: it has to be 0 or 1")
        if there == "1" and not 0 < speed < math.inf:
            raise DataError(f"{file}, line {number}: speed {speed:g} is not allowed: it has to be positive where online is 1")
        latest[client] = time
        yield client, time, speed if there == "1" else 0.0
