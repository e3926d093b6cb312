"""When clients are there, and how fast they are then: functions of (seed, client, time), so nothing is stored a client.

The base classes and what they share; the traces themselves are in ``participation`` and ``recorded``.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import model_validator
from torch import Tensor

from hanse.core.part import Part
from hanse.fleet.distributions import Positive
from hanse.fleet.population import Population

HORIZON = 1 << 14
"""A trace looks at least so many of its pieces ahead; what has not happened by then never does."""

CELLS = 1 << 20
"""Pieces of a trace that are looked at together, over all clients; bounds the memory."""

RESOLUTION = 1e-9
"""Seconds. A moment that close to the end of a piece, or a few units in its last place, belongs to the next piece: virtual time is
kept in nanoseconds, so that a client has to be there at the moment it is back, rounded."""


class Finish(NamedTuple):
    """When some clients' work is done, each ``[C]``."""

    at: Tensor
    """Virtual seconds, float64; inf if never, the moment the client went away where ``broken``."""
    broken: Tensor
    """Whether the client went away in the middle and its work is lost, bool."""


class Trace(Part):
    """Base of all traces."""

    kind: ClassVar[str] = "trace"
    abstract: ClassVar[bool] = True

    @property
    def counts_rounds(self) -> bool:
        """Whether presence changes with rounds rather than with virtual time; work in progress is then never interrupted."""
        return False

    def online(self, population: Population, clients: Tensor, now: float, round: int) -> Tensor:
        """Who of ``clients`` is there, bool ``[C]``."""
        raise TypeError(f"{type(self).__name__} does not define online")

    def finish(self, population: Population, clients: Tensor, start: Tensor, seconds: Tensor) -> Finish:
        """When work of ``seconds`` at full speed, begun at ``start`` (each float64 ``[C]``), is done."""
        raise TypeError(f"{type(self).__name__} does not define finish")

    def back(self, population: Population, clients: Tensor, now: float) -> Tensor:
        """The next time at or after ``now`` when each of ``clients`` is there, float64 ``[C]``; inf if never."""
        raise TypeError(f"{type(self).__name__} does not define back")

    def gone(self, population: Population, clients: Tensor, now: float) -> Tensor:
        """The next time at or after ``now`` when each of ``clients`` is away, float64 ``[C]``; inf if never."""
        raise TypeError(f"{type(self).__name__} does not define gone")

    def away(self, population: Population, clients: Tensor, until: float) -> Tensor:
        """Absences of ``clients`` from time 0 to ``until``, as for a picture: float64 ``[K, 3]``, rows (client, from, to).

        ``until`` is finite. Rows are in the order of ``clients`` and of time; where presence changes with rounds, times are round
        numbers.
        """
        raise TypeError(f"{type(self).__name__} does not define away")


class always(Trace):
    """Everyone is there, at full speed."""

    def online(self, population: Population, clients: Tensor, now: float, round: int) -> Tensor:
        return torch.ones(len(clients), dtype=torch.bool)

    def finish(self, population: Population, clients: Tensor, start: Tensor, seconds: Tensor) -> Finish:
        return Finish(start + seconds, torch.zeros(len(clients), dtype=torch.bool))

    def back(self, population: Population, clients: Tensor, now: float) -> Tensor:
        return torch.full((len(clients),), now, dtype=torch.float64)

    def gone(self, population: Population, clients: Tensor, now: float) -> Tensor:
        return torch.full((len(clients),), torch.inf, dtype=torch.float64)

    def away(self, population: Population, clients: Tensor, until: float) -> Tensor:
        return torch.empty(0, 3, dtype=torch.float64)


class Piecewise(Trace):
    """Base of traces whose speed is constant on pieces of time, numbered from 0 for every client.

    A subclass says which piece a moment is in (``piece``) and what some pieces are (``pieces``). Work goes on at the speed of each
    piece in turn, and stands still where it is 0. What would take more than ``HORIZON`` pieces is never done.
    """

    abstract: ClassVar[bool] = True
    lost: bool = False
    """Whether work in progress is lost when the client goes away, instead of going on when it is back."""

    def piece(self, population: Population, clients: Tensor, time: Tensor) -> Tensor:
        """Number of the piece of each client that holds ``time`` (float64 ``[C]``, finite), int64 ``[C]``."""
        raise TypeError(f"{type(self).__name__} does not define piece")

    def pieces(self, population: Population, clients: Tensor, first: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """``n`` pieces of each client from number ``first`` (int64 ``[C]``) on: where they begin and the last one ends, float64
        ``[C, n + 1]``, and the speed factor in each, float64 ``[C, n]``. Pieces that begin at inf have speed 0.
        """
        raise TypeError(f"{type(self).__name__} does not define pieces")

    def _piece(self, population: Population, clients: Tensor, time: Tensor) -> Tensor:
        return self.piece(population, clients, time * (1 + 4 * sys.float_info.epsilon) + RESOLUTION)

    def online(self, population: Population, clients: Tensor, now: float, round: int) -> Tensor:
        first = self._piece(population, clients, torch.full((len(clients),), now, dtype=torch.float64))
        return self.pieces(population, clients, first, 1)[1][:, 0] > 0

    def finish(self, population: Population, clients: Tensor, start: Tensor, seconds: Tensor) -> Finish:
        """When work of ``seconds`` at full speed, begun at ``start`` (each float64 ``[C]``), is done.

        Work of no length is done at once, wherever the client is.
        """
        at = torch.where(seconds > 0, torch.inf, start)
        broken = torch.zeros(len(clients), dtype=torch.bool)
        rows = ((seconds > 0) & start.isfinite()).nonzero()[:, 0]
        first, left = self._piece(population, clients[rows], start[rows]), seconds[rows]
        seen, n = 0, 16
        while len(rows) and seen < HORIZON:
            n = min(n, max(4, CELLS // len(rows)))
            edges, speed = self.pieces(population, clients[rows], first, n)
            begin = torch.maximum(edges[:, :-1], start[rows, None])
            able = torch.where(speed > 0, speed * (edges[:, 1:] - begin).clamp(min=0), 0.0)
            done = able.cumsum(1)
            enough = done >= (left - 1e-12 * seconds[rows])[:, None]  # of the rounding of sums
            ends, leaves = _first(enough), _first(speed == 0) if self.lost else torch.full_like(rows, n)
            ended, left_off = ends < leaves, leaves < ends
            k = torch.where(ended, ends, leaves).clamp(max=n - 1)[:, None]
            before = torch.where(k > 0, done.gather(1, (k - 1).clamp(min=0)), 0.0)
            worked = begin.gather(1, k) + (left[:, None] - before) / speed.gather(1, k)
            moment = torch.where(ended[:, None], worked.minimum(edges.gather(1, k + 1)), begin.gather(1, k))[:, 0]
            decided = ended | left_off
            at[rows[decided]], broken[rows[decided]] = moment[decided], left_off[decided]
            going = ~decided & (edges[:, -1] < torch.inf)
            rows, first, left = rows[going], first[going] + n, (left - done[:, -1])[going]
            seen, n = seen + n, 2 * n
        return Finish(at, broken)

    def back(self, population: Population, clients: Tensor, now: float) -> Tensor:
        return self._next(population, clients, now, there=True)

    def gone(self, population: Population, clients: Tensor, now: float) -> Tensor:
        return self._next(population, clients, now, there=False)

    def _next(self, population: Population, clients: Tensor, now: float, there: bool) -> Tensor:
        at = torch.full((len(clients),), torch.inf, dtype=torch.float64)
        rows = torch.arange(len(clients))
        first = self._piece(population, clients, torch.full_like(at, now))
        seen, n = 0, 16
        while len(rows) and seen < HORIZON:
            n = min(n, max(4, CELLS // len(rows)))
            edges, speed = self.pieces(population, clients[rows], first, n)
            k = _first((speed > 0) == there)
            begin = edges.gather(1, k[:, None])[:, 0]
            found = (k < n) & (begin < torch.inf)
            at[rows[found]] = torch.where((k == 0) & (seen == 0), now, begin)[found]
            going = ~found & (edges[:, -1] < torch.inf)
            rows, first = rows[going], first[going] + n
            seen, n = seen + n, 2 * n
        return at

    def away(self, population: Population, clients: Tensor, until: float) -> Tensor:
        first = self.piece(population, clients, torch.zeros(len(clients), dtype=torch.float64))
        blocks, n = [self.pieces(population, clients, first, 16)], 16
        while len(clients) and float(blocks[-1][0][:, -1].min()) < until:
            blocks.append(self.pieces(population, clients, first + n, n))
            n *= 2
        begin, end = (torch.cat([edges[:, cut] for edges, _ in blocks], 1) for cut in (slice(None, -1), slice(1, None)))
        absent = (torch.cat([speed for _, speed in blocks], 1) == 0) & (begin < until) & (end > begin)
        edge = torch.zeros(len(clients), 1, dtype=torch.bool)
        leaves = absent & ~torch.cat([edge, absent[:, :-1]], 1)
        returns = absent & ~torch.cat([absent[:, 1:], edge], 1)
        who = clients[leaves.nonzero()[:, 0]].double()
        return torch.stack([who, begin[leaves], end[returns].clamp(max=until)], 1)


def _first(flags: Tensor) -> Tensor:
    """Place of the first True in each row of ``[C, n]``, n where there is none, int64 ``[C]``."""
    return torch.where(flags.any(1), flags.int().argmax(1), flags.shape[1])


class Slotted(Piecewise):
    """Base of traces that are constant on slots of equal length; a subclass gives only ``level``.

    Slot s of every client is the time from ``s * slot`` to ``(s + 1) * slot`` seconds. Without a length a slot is a round: presence
    is then a matter of rounds alone, and work in progress is never interrupted.
    """

    abstract: ClassVar[bool] = True
    slot: Positive | None = None
    """Seconds a slot; None: a slot is a round."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """These fields come last also where a subclass gives them another default: ``crashes(600, 30)`` are two times."""
        super().__pydantic_init_subclass__(**kwargs)
        for name in ("slot", "lost"):
            cls.model_fields[name] = cls.model_fields.pop(name)

    @model_validator(mode="after")
    def _losing(self) -> Self:
        if self.lost and self.slot is None:
            raise ValueError("lost needs slots of so many seconds: rounds interrupt no work")
        return self

    def level(self, population: Population, clients: Tensor, slots: Tensor) -> Tensor:
        """Speed factor of ``clients`` in ``slots`` (int64 ``[C, S]``, consecutive along a row), float64 ``[C, S]``; 0 is away."""
        raise TypeError(f"{type(self).__name__} does not define level")

    @property
    def counts_rounds(self) -> bool:
        return self.slot is None

    @property
    def unit(self) -> float:
        """Length of a slot, in seconds or rounds."""
        return self.slot or 1.0

    def piece(self, population: Population, clients: Tensor, time: Tensor) -> Tensor:
        slots = (time / self.unit).floor()
        # The quotient may be rounded across an edge; the product is what ``pieces`` calls the edge.
        return slots.long() + ((slots + 1) * self.unit <= time).long() - (slots * self.unit > time).long()

    def pieces(self, population: Population, clients: Tensor, first: Tensor, n: int) -> tuple[Tensor, Tensor]:
        slots = first[:, None] + torch.arange(n + 1)
        return slots.double() * self.unit, self.level(population, clients, slots[:, :-1])

    def online(self, population: Population, clients: Tensor, now: float, round: int) -> Tensor:
        return super().online(population, clients, float(round) if self.slot is None else now, round)

    def finish(self, population: Population, clients: Tensor, start: Tensor, seconds: Tensor) -> Finish:
        if self.slot is None:
            return always().finish(population, clients, start, seconds)
        return super().finish(population, clients, start, seconds)

    def back(self, population: Population, clients: Tensor, now: float) -> Tensor:
        if self.slot is None:
            return always().back(population, clients, now)
        return super().back(population, clients, now)

    def gone(self, population: Population, clients: Tensor, now: float) -> Tensor:
        if self.slot is None:
            return always().gone(population, clients, now)
        return super().gone(population, clients, now)
