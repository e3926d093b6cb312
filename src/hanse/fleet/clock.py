"""Virtual time: what is on its way, and what happens next.

A deterministic event queue. Times are whole nanoseconds, so that they add without rounding and equal times are equal on every
machine. What happens in the same instant is taken in this order: replies by client, then jobs given up, then rests that are over.

Jobs are rows of one table and the next event is its minimum, so time and memory grow with the jobs that are out, not (but for four
bytes each) with the clients that are registered; and a checkpoint is the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanse.core.errors import CheckpointError
from hanse.core.messages import Tensors
from hanse.core.streams import Streams
from hanse.fleet.population import Population
from hanse.fleet.profiles import Fleet, Profile, Work

NEVER = 1 << 62
"""A time that does not come."""
SECOND = 1_000_000_000

COLUMNS = (
    "ticket",  # number of the job
    "client",
    "version",  # the round of the model that was sent
    "key",  # what the client's chance is drawn for: no two jobs of a client share it
    "steps",
    "message",  # number of the message
    "sent",  # times: the server sent it, the client had it, had computed, its reply arrives, the server gives it up
    "received",
    "computed",
    "arrives",
    "expires",
    "up",  # bytes of the reply
    "known",  # whether ``up``, and with it ``arrives``, is known yet; before, ``arrives`` is the earliest possible
    "ignored",  # whether the server has given it up
    "twice",  # whether the reply arrives twice
)
Jobs = NDArray[Any]
"""Rows of jobs: int64 fields named as in ``COLUMNS``; float64 fields ``rate``, bytes a second to the server, and ``share``, what
part of its entries the client may send (0: the codec's own)."""
JOB = np.dtype([*((name, np.int64) for name in COLUMNS), ("rate", np.float64), ("share", np.float64)])


class Mark(NamedTuple):
    """A moment: counters, jobs out, replies that had arrived, rests."""

    counters: tuple[int, ...]
    out: Jobs
    arrived: Jobs
    rests: NDArray[np.int64]


class Events(NamedTuple):
    """What one wait ended with."""

    arrived: Jobs
    """Replies, in order of arrival."""
    lost: Jobs
    """Jobs given up."""
    rested: Tensor
    """Clients whose rest is over, int64."""
    due: bool
    """Whether the time has come until which the wait was to last."""


def nanoseconds(seconds: float | Tensor) -> NDArray[np.int64]:
    """Seconds to the nearest nanosecond; inf to ``NEVER``."""
    scaled = np.rint(np.asarray(seconds, dtype=np.float64) * SECOND)
    return np.where(scaled < NEVER, scaled, NEVER).astype(np.int64)


def among(column: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of ``column`` are in ``values``; on a few numbers, as in most calls, ``np.isin`` takes far longer."""
    if len(column) * len(values) > 4096:
        return np.isin(column, values)
    found: NDArray[np.bool_] = (column[:, None] == values).any(1)
    return found


class Clock:
    """The time, the jobs that are out, the replies that have arrived, and what has travelled.

    ``time`` is in nanoseconds; ``down`` and ``up`` count bytes; ``lost`` jobs were given up, ``late`` replies came after that, and
    ``duplicates`` came twice.
    """

    def __init__(self, fleet: Fleet, population: Population, streams: Streams) -> None:
        self.fleet, self.population, self.streams = fleet, population, streams
        self.time = self.down = self.up = self.late = self.lost = self.duplicates = self.tickets = 0
        self.out, self.arrived = np.empty(0, JOB), np.empty(0, JOB)
        self.rests = np.empty((0, 2), np.int64)
        self.timeless = fleet.profile(population, torch.zeros(1, dtype=torch.long)) is None
        """Whether every device and link is infinitely fast."""
        self._slot, self._drawn = np.full(population.size, -1, np.int32), torch.empty(0, dtype=torch.float64)
        self.ended: list[tuple[Jobs, int, bool]] = []
        """Jobs that came to an end, when, and whether the server used them; emptied by whoever reads it."""

    @property
    def now(self) -> float:
        """Virtual seconds."""
        return float(self.time / SECOND)

    @property
    def live(self) -> Jobs:
        """Jobs that are out and not given up."""
        live: Jobs = self.out[self.out["ignored"] == 0]
        return live

    def send(
        self,
        clients: Tensor,
        version: int,
        keys: NDArray[np.int64],
        message: NDArray[np.int64],
        size: Tensor,
        work: Work,
        patience: float,
        share: Tensor | None = None,
    ) -> Jobs:
        """Send messages of ``size`` bytes, int64 ``[C]``, to ``clients``; the jobs this starts, in the order of ``clients``.

        ``message`` is the number of the message that all get, int64 ``[1]``, or of each one's, ``[C]``.

        A job that the server had given up ends here: its client turns to the new one.
        """
        who, profile = clients.numpy(), self.profile(clients)
        self._abandon(who)
        jobs = np.zeros(len(who), JOB)
        jobs["ticket"] = self.tickets + np.arange(len(who))
        jobs["client"], jobs["version"], jobs["key"], jobs["message"] = who, version, keys, message
        jobs["steps"], jobs["sent"] = work.steps.numpy(), self.time
        jobs["rate"], jobs["share"] = np.inf, 0 if share is None else share.numpy()
        jobs["expires"] = NEVER if math.isinf(patience) else min(self.time + int(nanoseconds(patience)), NEVER)
        self.tickets += len(who)
        self.down += int(size.sum())
        for name in ("received", "computed", "arrives"):
            jobs[name] = self.time
        if profile is not None:
            self._place(jobs, clients, profile, size, work)
        self.out = np.concatenate([self.out, jobs]) if len(self.out) else jobs.copy()
        return jobs

    def profile(self, clients: Tensor) -> Profile | None:
        """The devices of ``clients``; each is drawn once, when it first gets a job."""
        if self.timeless or not len(clients):
            return None
        who = clients.numpy()
        new = np.unique(who[self._slot[who] < 0])
        if len(new):
            drawn = self.fleet.profile(self.population, torch.from_numpy(new))
            assert drawn is not None
            self._slot[new] = len(self._drawn) + np.arange(len(new))
            self._drawn = torch.cat([self._drawn.reshape(-1, len(drawn)), torch.stack([*drawn], 1)])
        return Profile(*self._drawn[torch.from_numpy(self._slot[who]).long()].unbind(1))

    def links(self, clients: Tensor) -> tuple[Tensor, Tensor] | None:
        """Bytes per second to the server and latency of ``clients``, float64 ``[C]``; None where nothing takes time."""
        profile = self.profile(clients)
        return None if profile is None else (profile.up, profile.latency)

    def finish(self, clients: Tensor, work: Work) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """When ``clients`` will have done ``work`` where they are if they begin now, ``[C]``, ``NEVER`` if they go away before; and
        when their work ends, one way or the other.
        """
        now, profile = np.full(len(clients), self.time), self.profile(clients)
        if profile is None:
            return now, now
        at, broken = self.fleet.trace.finish(self.population, clients, torch.from_numpy(now / SECOND), profile.compute(work))
        over = np.maximum(nanoseconds(at), now)
        return np.where(broken.numpy(), NEVER, over), over

    def go_on(self, time: int) -> None:
        """Let time pass until then."""
        self.time = max(self.time, time)

    def _place(self, jobs: Jobs, clients: Tensor, profile: Profile, size: Tensor, work: Work) -> None:
        jobs["received"] = nanoseconds(profile.latency + size / profile.down) + self.time
        jobs["computed"] = self._computed(clients, jobs["received"], profile, work)
        arrives = jobs["computed"] + nanoseconds(profile.latency)
        gone = self._chance("link.loss", clients, jobs, profile.loss) | (jobs["computed"] >= NEVER)
        jobs["arrives"], jobs["rate"] = np.where(gone, NEVER, arrives), profile.up
        jobs["twice"] = self._chance("link.duplicates", clients, jobs, profile.duplicates)

    def _computed(self, clients: Tensor, start: NDArray[np.int64], profile: Profile, work: Work) -> NDArray[np.int64]:
        """When ``clients`` that begin at ``start`` have done their ``work``; ``NEVER`` where they go away for good before."""
        at, broken = self.fleet.trace.finish(self.population, clients, torch.from_numpy(start / SECOND), profile.compute(work))
        return np.where(broken.numpy(), NEVER, np.maximum(nanoseconds(at), start))

    def _chance(self, purpose: str, clients: Tensor, jobs: Jobs, probability: Tensor) -> NDArray[np.bool_]:
        if not bool((probability > 0).any()):
            return np.zeros(len(jobs), dtype=bool)
        drawn = self.streams.uniform(purpose, clients, torch.from_numpy(jobs["key"].copy()))[:, 0]
        return (drawn < probability).numpy()

    @property
    def still(self) -> bool:
        """Whether nothing takes time on this fleet and nothing is under way."""
        return self.timeless and not (len(self.out) or len(self.arrived) or len(self.rests))

    def exchange(self, down: Tensor, up: Tensor) -> None:
        """Clients get messages of ``down`` bytes and send replies of ``up`` bytes, int64 each, while time is ``still``."""
        self.tickets += len(down)
        self.down += int(down.sum())
        self.up += int(up.sum())

    def weigh(self, tickets: NDArray[np.int64], sizes: Tensor) -> None:
        """The replies of ``tickets``, which will arrive or have, are of ``sizes`` bytes, int64; from now on it is known when."""
        order = np.argsort(tickets)
        for table in (self.out, self.arrived):
            rows = np.flatnonzero(among(table["ticket"], tickets))
            up = sizes.numpy()[order[np.searchsorted(tickets, table["ticket"][rows], sorter=order)]]
            table["up"][rows], table["known"][rows] = up, 1
            if table is self.out:
                table["arrives"][rows] += nanoseconds(up / table["rate"][rows])
            else:  # what has arrived did not depend on it
                self.up += int((up * (1 + table["twice"][rows])).sum())

    def advance(self, replies: int, until: float, weigh: Callable[[], None]) -> Events:
        """Go on to the first of: ``replies`` more replies (or as many as can still come), a job given up, a rest over, ``until``.

        Where no further reply can come, the jobs that are out are given up. ``weigh`` is called when the order of events depends
        on sizes not yet known, and before a reply arrives too late, because nobody will ask for its size afterwards.
        """
        while True:
            live = self.live
            arrives = np.sort(live["arrives"])
            coming = int((arrives < NEVER).sum())
            last = int(arrives[min(replies, coming) - 1]) if coming else NEVER
            alarm = min(int(live["expires"].min(initial=NEVER)), int(self.rests[:, 1].min(initial=NEVER)), int(nanoseconds(until)))
            time = min(last, alarm)
            due = (self.out["known"] == 0) & (self.out["arrives"] <= min(time, NEVER - 1))
            if not bool((due & (np.isfinite(self.out["rate"]) | (self.out["ignored"] != 0))).any()):
                break
            weigh()
        if time < NEVER:
            self.time = max(self.time, time)
        return self.happened(until, hopeless=replies > coming and time == last and alarm >= NEVER)

    def happened(self, until: float, hopeless: bool = False) -> Events:
        """What has happened by now; where it is ``hopeless`` to wait for more, the jobs that are out are given up."""
        there = self.out["arrives"] <= self.time
        arrived = self._receive(self.out[there])
        self.out = self.out[~there]
        lost = self._give_up(hopeless)
        over = self.rests[:, 1] <= self.time
        rested = torch.from_numpy(np.sort(self.rests[over, 0]))
        self.rests = self.rests[~over]
        return Events(arrived, lost, rested, due=self.time >= int(nanoseconds(until)))

    def _give_up(self, hopeless: bool) -> Jobs:
        """The jobs whose time is over, or all without a reply if there is no hope for any; some may still come, too late."""
        lost: Jobs = self.out[:0]
        if len(self.out):
            over = (self.out["expires"] <= self.time) | (hopeless & (self.out["arrives"] >= NEVER))
            lost = self.out[over & (self.out["ignored"] == 0)]
            self.out["ignored"][over] = 1
            self.out = self.out[(self.out["ignored"] == 0) | (self.out["arrives"] < NEVER)]
        self.lost += len(lost)
        self.ended.append((lost, self.time, False))
        return lost

    def _receive(self, jobs: Jobs) -> Jobs:
        self.up += int((jobs["up"] * (1 + jobs["twice"])).sum())
        self.duplicates += int(jobs["twice"].sum())
        self.late += int((jobs["ignored"] != 0).sum())
        used: Jobs = jobs[jobs["ignored"] == 0]
        used = used[np.lexsort((used["ticket"], used["client"], used["arrives"]))]
        self.arrived = np.concatenate([self.arrived, used]) if len(self.arrived) else used
        return used

    def take(self, tickets: NDArray[np.int64], used: bool = True) -> Jobs:
        """Remove replies from those that have arrived."""
        taken = among(self.arrived["ticket"], tickets)
        jobs, self.arrived = self.arrived[taken], self.arrived[~taken]
        self.ended.append((jobs, self.time, used))
        return jobs

    def call_off(self, tickets: NDArray[np.int64]) -> None:
        """Tell the clients to stop: nothing comes of these jobs any more, nor of their replies that have arrived."""
        off = among(self.out["ticket"], tickets)
        self.ended.append((self.out[off], self.time, False))
        self.out = self.out[~off]
        self.take(tickets, used=False)

    def _abandon(self, clients: NDArray[np.int64]) -> None:
        if len(self.out):
            mine = among(self.out["client"], clients)
            busy = self.out["client"][mine & (self.out["ignored"] == 0)]
            if len(busy):
                raise ValueError(f"client {busy[0]} is at work")
            self.out = self.out[~mine]
        if len(self.rests):
            self.rests = self.rests[~among(self.rests[:, 0], clients)]

    def rest(self, clients: Tensor, seconds: Tensor) -> None:
        """Have ``clients`` check in after so many seconds, float64 ``[C]``."""
        new = np.stack([clients.numpy(), self.time + nanoseconds(seconds)], 1)
        self.rests = np.concatenate([self.rests, new])

    def mark(self) -> Mark:
        """What ``take_back`` needs to come back to this moment."""
        return Mark(self._counters(), self.out.copy(), self.arrived.copy(), self.rests)

    def take_back(self, mark: Mark) -> None:
        """Go back to a moment."""
        self._count(mark.counters)
        self.out, self.arrived, self.rests = mark.out, mark.arrived, mark.rests

    def _counters(self) -> tuple[int, ...]:
        return self.time, self.down, self.up, self.late, self.lost, self.duplicates, self.tickets

    def _count(self, counters: tuple[int, ...]) -> None:
        self.time, self.down, self.up, self.late, self.lost, self.duplicates, self.tickets = counters

    def snapshot(self) -> Tensors:
        """Named tensors from which ``restore`` goes on."""
        tables = {"out": self.out, "arrived": self.arrived}
        return {
            "counters": torch.tensor(self._counters()),
            "rests": torch.from_numpy(self.rests.copy()),
            **{
                name: torch.from_numpy(rows.copy().view(np.int64).reshape(-1, len(JOB.names or ())))
                for name, rows in tables.items()
            },
        }

    def restore(self, saved: Tensors) -> None:
        """Bring a snapshot back; raises ``CheckpointError`` if it is none."""
        width = len(JOB.names or ())
        columns = {"counters": (), "rests": (2,), "out": (width,), "arrived": (width,)}
        whose = {"rests": 0, "out": COLUMNS.index("client"), "arrived": COLUMNS.index("client")}
        for name, shape in columns.items():
            table = saved.get(name)
            if table is None or table.dtype != torch.int64 or not table.dim() or table.shape[1:] != shape:
                raise CheckpointError(f"clock.{name}: the checkpoint's jobs cannot be read")
            if name in whose and bool(((table[:, whose[name]] < 0) | (table[:, whose[name]] >= self.population.size)).any()):
                raise CheckpointError(f"clock.{name}: the checkpoint's jobs are not of {self.population.size} clients")
        if len(saved["counters"]) != 7:
            raise CheckpointError("clock.counters: the checkpoint's jobs cannot be read")
        self._count(tuple(map(int, saved["counters"])))
        self.rests = saved["rests"].numpy().copy()
        self.out, self.arrived = (saved[n].numpy().copy().view(JOB).reshape(-1) for n in ("out", "arrived"))
