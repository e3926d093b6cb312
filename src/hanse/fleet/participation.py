"""Traces that are drawn: who is there in which slot of time.

The three patterns ``bernoulli``, ``markov`` and ``cyclic`` are those of Wang, Ji: "A Lightweight Method for Tackling Unknown
Participation Statistics in Federated Averaging", ICLR 2024, arXiv 2306.03401, with ``rate=by_labels()`` its rates.
"""

from __future__ import annotations

import sys
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from hanse.fleet.distributions import CHANCE, POSITIVE, Amount, Chance, Limits, Positive, PositiveAmount, Share, constant
from hanse.fleet.population import Population
from hanse.fleet.traces import CELLS, Piecewise, Slotted

SLOWER = Limits(1.0, sys.float_info.max, "finite and at least 1")


def uniforms(population: Population, purpose: str, clients: Tensor, slots: Tensor) -> Tensor:
    """A uniform number a client and slot (int64 ``[C, S]``, consecutive along a row), float64 ``[C, S]``.

    Slots go into the counter that is the round elsewhere, four to a block, which is what one evaluation of the generator yields;
    so any slot costs the same, however late it is.
    """
    blocks = (slots.shape[1] + 6) // 4  # as many as the slots touch if the first one is the last of its block
    which = slots[:, :1] // 4 + torch.arange(blocks)
    drawn = population.streams.uniform(purpose, clients.repeat_interleave(blocks), which.flatten(), n=4)
    return drawn.view(len(clients), 4 * blocks).gather(1, slots - 4 * which[:, :1])


def chain(
    population: Population, purpose: str, clients: Tensor, slots: Tensor, come: Tensor, stay: Tensor, first: Tensor
) -> Tensor:
    """Whether each client, a two-state Markov chain, is there in ``slots`` (as in ``uniforms``), bool ``[C, S]``; needs no history.

    With the uniform number u of a slot, a client is there if ``u < stay`` when it was there the slot before, and if ``u < come``
    when it was not (each float64 ``[C]``); in slot 0 if ``u < first``. So a slot whose u is below both or not below either decides
    by itself. Only from the others does one have to look back, until one decides or slot 0 comes.
    """
    low, high = torch.minimum(come, stay), torch.maximum(come, stay)
    flips = stay < come
    state = torch.zeros(len(clients), dtype=torch.bool)
    rows, end = torch.arange(len(clients)), slots[:, 0] + 1
    n = 16
    while len(rows):
        n = min(n, max(4, CELLS // len(rows)))
        begin = (end - n).clamp(min=0)
        window = begin[:, None] + torch.arange(n)
        u = uniforms(population, purpose, clients[rows], window)
        decides = (u < low[rows, None]) | (u >= high[rows, None]) | (window == 0)
        last, k = torch.where(decides & (window < end[:, None]), window, -1).max(1)
        found = last >= 0
        here, at = rows[found], last[found]
        there = u[found].gather(1, k[found, None])[:, 0] < torch.where(at == 0, first[here], low[here])
        state[here] = there ^ (flips[here] & ((slots[here, 0] - at) % 2 == 1))
        rows, end, n = rows[~found], begin[~found], 2 * n
    u = uniforms(population, purpose, clients, slots)
    there = u < low[:, None]
    decides = there | (u >= high[:, None])
    there[:, 0], decides[:, 0] = state, True
    place = torch.arange(slots.shape[1])
    last = torch.where(decides, place, 0).cummax(1).values
    return there.gather(1, last) ^ (flips[:, None] & ((place - last) % 2 == 1))


class bernoulli(Slotted):
    """There in each slot with a probability, whatever was before."""

    rate: Chance
    """Probability of being there."""

    def level(self, population: Population, clients: Tensor, slots: Tensor) -> Tensor:
        rate = CHANCE.draw(self.rate, population, clients, "trace.bernoulli.rate")
        return (uniforms(population, "trace.bernoulli", clients, slots) < rate[:, None]).double()


class markov(Slotted):
    """Comes and goes as a Markov chain that is there for a share p = ``rate`` of the slots in the long run.

        absent -> there   with probability  on
        there -> absent   with probability  on * (1/p - 1);   if that exceeds 1 it becomes 1, and on is divided by it

    In slot 0 a client is there with probability p.
    """

    rate: Chance
    """Share p of slots in the long run."""
    on: Share = 0.05
    """Probability that a client which is absent is there in the next slot."""

    def level(self, population: Population, clients: Tensor, slots: Tensor) -> Tensor:
        p = CHANCE.draw(self.rate, population, clients, "trace.markov.rate")
        off = self.on * (1 / p - 1)
        come, stay = self.on / off.clamp(min=1), 1 - off.clamp(max=1)
        return chain(population, "trace.markov", clients, slots, come, stay, first=p).double()


class cyclic(Slotted):
    """There for the first slots of every period, absent for the rest of it; each client's period begins at an offset of its own."""

    rate: Chance
    """Share of the period; at least one slot, and at most all but one."""
    period: Annotated[int, Field(ge=2)] = 100
    """Slots of a period."""

    def level(self, population: Population, clients: Tensor, slots: Tensor) -> Tensor:
        rate = CHANCE.draw(self.rate, population, clients, "trace.cyclic.rate")
        active = (rate * self.period).round().clamp(1, self.period - 1)
        offset = (population.streams.uniform("trace.cyclic", clients) * self.period).long()
        return ((slots + offset) % self.period < active[:, None]).double()


class diurnal(Slotted):
    """There for a share of every day, as phones that charge at night; each client's day begins at a time of its own.

    A client is there in the slots whose middle falls into its hours, so the share is met to about a slot.
    """

    day: Positive = 86400.0
    """Seconds of a day."""
    share: Chance = constant(0.5)
    """Share of the day."""
    slot: Positive = 600.0
    """Seconds a slot, at most a day."""

    @model_validator(mode="after")
    def _short(self) -> Self:
        if self.slot > self.day:
            raise ValueError("slot has to be at most day")
        return self

    def level(self, population: Population, clients: Tensor, slots: Tensor) -> Tensor:
        share = CHANCE.draw(self.share, population, clients, "trace.diurnal.share")
        phase = population.streams.uniform("trace.diurnal", clients)
        return (((slots.double() + 0.5) * self.slot / self.day + phase) % 1.0 < share[:, None]).double()


class crashes(Slotted):
    """Goes away at random moments for random times, and by default loses its work; everyone is there at first.

    Both times are memoryless: a client that is there crashes in the next slot with probability ``slot / every``, and one that is
    away is back in the next slot with probability ``slot / lasts``. Raises ``ConfigError`` when either time is shorter than a slot.
    """

    every: PositiveAmount
    """Mean seconds from coming back to the next crash; inf: never."""
    lasts: PositiveAmount
    """Mean seconds of an absence; inf: for ever."""
    slot: Positive = 60.0
    """Seconds a slot; crashes happen at its edges."""
    lost: bool = True
    """Whether work in progress is lost in a crash, instead of going on when the client is back."""

    def level(self, population: Population, clients: Tensor, slots: Tensor) -> Tensor:
        times = Limits(self.slot, POSITIVE.most, f"at least a slot, {self.slot:g} s")
        crash = self.slot / times.draw(self.every, population, clients, "trace.crashes.every")
        come = self.slot / times.draw(self.lasts, population, clients, "trace.crashes.lasts")
        return chain(population, "trace.crashes", clients, slots, come, 1 - crash, first=torch.ones_like(come)).double()


class slowdowns(Slotted):
    """Stays there, but other work on the device makes it slower in some slots."""

    rate: Chance
    """Share of slots in which it is slower, each drawn by itself."""
    factor: Annotated[Amount, AfterValidator(SLOWER.check)]
    """How many times slower, at least 1."""
    slot: Positive = 60.0
    """Seconds a slot."""
    lost: Literal[False] = False
    """False: nobody goes away."""

    def level(self, population: Population, clients: Tensor, slots: Tensor) -> Tensor:
        rate = CHANCE.draw(self.rate, population, clients, "trace.slowdowns.rate")
        factor = SLOWER.draw(self.factor, population, clients, "trace.slowdowns.factor")
        slow = uniforms(population, "trace.slowdowns", clients, slots) < rate[:, None]
        return torch.where(slow, 1 / factor[:, None], 1.0)


class Once(Piecewise):
    """Base of traces in which some clients change once: they are there on one side of a moment only."""

    abstract: ClassVar[bool] = True
    share: Annotated[float, Field(ge=0, le=1)]
    """Share of the clients, drawn once: the nearest number of them."""
    at: Positive
    """The moment, seconds."""
    before: ClassVar[bool]
    """Whether they are there before the moment."""

    def piece(self, population: Population, clients: Tensor, time: Tensor) -> Tensor:
        return (time >= self.at).long()

    def pieces(self, population: Population, clients: Tensor, first: Tensor, n: int) -> tuple[Tensor, Tensor]:
        number = first[:, None] + torch.arange(n + 1)
        edges = number.double().clamp(max=1) * self.at + torch.where(number > 1, torch.inf, 0.0)
        some = population.streams.sample("trace.once", population.size, round(self.share * population.size), 0)
        there = ~torch.isin(clients, some)[:, None] | ((number[:, :-1] == 0) == self.before)
        return edges, (there & (number[:, :-1] < 2)).double()


class leaves(Once):
    """There until a moment; then a share of the clients goes away for good, with what they are working at."""

    before: ClassVar[bool] = True


class joins(Once):
    """A share of the clients comes at a moment, and was never there before."""

    before: ClassVar[bool] = False
