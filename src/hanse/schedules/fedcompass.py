"""FedCompass: clients get as many local steps as make them finish together, so that groups of them are aggregated while fresh.

Li, Chaturvedi, He, Chen, Singh, Kindratenko, Huerta, Kim, Madduri: "FedCompass: Efficient Cross-Silo Federated Learning on
Heterogeneous Client Devices Using a Computing Power Aware Scheduler", ICLR 2024, arXiv 2309.14675.

    at first:           everybody gets x with Q = Qmax, and is in no group
    client i arrives:   s_i <- (1 - beta) s_i + beta (seconds per step of this job), or just the latter the first time
        its first:      aggregate Delta_i alone;   assign(i)
        in time:        Delta_i joins what its group has brought, and i waits;   nobody is out:  close the group
        late:           Delta_i goes to the buffer B;   assign(i)
    time Tl(g) comes:   close g
    close g:            aggregate B and what g has brought;   assign(i) to those back, fastest first;   who is still out is late
    aggregate U:        x <- x + sum_{i in U} alpha st(V - v_i) p_i Delta_i;   V <- V + 1
    assign(i) at t:     join:    q_g = floor((Te(g) - t) / s_i);  with Qmin <= q_g <= Qmax for some g, the one with most:  Q_i = q_g
                        create:  q_g = floor((Tl(g) + Qmax s(fastest of g) - t) / s_i);  Q_i = max(Qmin, largest q_g <= Qmax),
                                 or Qmax if there is none;   Te = t + Q_i s_i,   Tl = t + lam Q_i s_i

p_i is the rule's importance, w_i / sum_j w_j over all clients: 1/m with uniform weights. Sent: what the rule sends, and Q_i, which
is not counted. Our choices where the paper is silent or its code differs: Delta_i is the client's own difference; st falls with
staleness; B is a list, so that no update is lost; it is aggregated at once if no group is open; clients whose job is lost leave
their group and are assigned when they are there; where nothing can come, the round stays empty. What happens in the same instant is
taken one by one: replies by client, then timers.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from hanse.core.messages import Tensors
from hanse.fleet.clock import SECOND, Jobs, nanoseconds
from hanse.methods.base import Method
from hanse.schedules.network import Network, Schedule, start
from hanse.schedules.staleness import Staleness, polynomial

FREE, LATE = -1, -2
"""Instead of a group's number: in no group; still out when its group was closed."""

SLACK = 0.5  # nanoseconds by which a time may have been rounded down; they must not cost a client a step


@dataclass
class Roster:
    """What the server knows of its N clients and G open groups, and all that a round leaves to the next.

    Of clients, ``[N]``: ``speed`` s, float64 nanoseconds per local step, at least 1, or 0 if not yet measured; ``group``, int64,
    a group's number, FREE or LATE; ``reply``, int64, the ticket of what it has brought its group, or -1. Of groups, in order of
    creation, ``[G]``: ``number``, int64; ``expected`` Te and ``latest`` Tl, float64 whole nanoseconds of virtual time. ``buffer``
    B: int64, the tickets of late replies, which the next aggregation takes.
    """

    speed: Tensor
    group: Tensor
    reply: Tensor
    number: Tensor
    expected: Tensor
    latest: Tensor
    buffer: Tensor

    @classmethod
    def new(cls, clients: int) -> Roster:
        """Nobody is known."""
        speed, free = torch.zeros(clients, dtype=torch.float64), torch.full((clients,), FREE)
        return cls(speed, free, free, free[:0], speed[:0], speed[:0], free[:0])

    def unread(self, arrived: Jobs) -> Jobs:
        """Those of the replies that no one has looked at."""
        new: Jobs = arrived[~np.isin(arrived["ticket"], torch.cat([self.buffer, self.reply]).numpy())]
        return new

    def arrive(self, job: np.void, beta: float) -> bool:
        """Note a reply; whether it is its client's first, which belongs to no group."""
        i = int(job["client"])
        before, group = float(self.speed[i]), int(self.group[i])
        measured = max(float(job["arrives"] - job["sent"]) / int(job["steps"]), 1.0)
        self.speed[i] = (1 - beta) * before + beta * measured if before else measured
        if group == LATE:
            self.buffer, self.group[i] = torch.cat([self.buffer, torch.tensor([job["ticket"]])]), FREE
        elif group != FREE:
            self.reply[i] = int(job["ticket"])
        return group == FREE

    def complete(self) -> Tensor:
        """Groups of which nobody is out any more, bool ``[G]``."""
        return ~torch.isin(self.number, self.group[self.reply < 0])

    def overdue(self, t: int) -> Tensor:
        """Groups whose time has come, bool ``[G]``."""
        return self.latest <= t * (1 + 4 * sys.float_info.epsilon)  # after weeks, seconds are too coarse for the very nanosecond

    def close(self, k: int) -> None:
        """What group ``k`` has brought goes to the buffer; who is still out is late."""
        members = self.group == self.number[k]
        back = members & (self.reply >= 0)
        self.buffer = torch.cat([self.buffer, self.reply[back]])
        self.group[members], self.group[back], self.reply[back] = LATE, FREE, -1
        others = torch.arange(len(self.number)) != k
        self.number, self.expected, self.latest = self.number[others], self.expected[others], self.latest[others]


class fedcompass(Schedule):
    """Groups that finish together; all clients take part."""

    q_min: PositiveInt = 20
    """Fewest local steps of a job, Qmin."""
    q_max: PositiveInt = 100
    """Most local steps of a job, Qmax."""
    lam: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.2
    """How many times as long as expected a group is waited for."""
    beta: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Weight of the newest measurement of a client's speed."""
    alpha: PositiveFloat = 0.9
    """Factor on every update."""
    staleness: Staleness = polynomial(0.5)
    """What an update counts that started from an old model, st."""
    patience: PositiveFloat = math.inf
    """Seconds after which a job without a reply is given up."""

    @model_validator(mode="after")
    def _ordered(self) -> fedcompass:
        if self.q_min > self.q_max:
            raise ValueError(f"fedcompass.q_min: {self.q_min} is not allowed: at most q_max, {self.q_max}")
        return self

    async def run(self, net: Network, method: Method) -> None:
        state, notes = await start(net, method, vars(Roster.new(net.clients)))
        while net.going():
            roster = Roster(**{name: t.clone() for name, t in notes.items()})
            jobs = await self._next(net, method.message(state), roster)
            scale = self.alpha * self.staleness(net.round - torch.from_numpy(jobs["version"]))
            reply = net.collect(jobs, scale, net.total_weight)
            if len(reply):
                state = method.step(state, reply, net.round)
            notes = vars(roster)
            await net.commit(state, notes)

    async def _next(self, net: Network, message: Tensors, roster: Roster) -> Jobs:
        """Keep everyone at work until there is something to aggregate: those replies, or none if nothing can happen."""
        given_up = 0  # jobs one after the other
        while given_up < net.clients:
            unread = roster.unread(net.arrived)
            absent = roster.reply < 0
            absent[torch.from_numpy(np.concatenate([net.out["client"], unread["client"]]))] = False
            idle, lost = absent & (roster.group == FREE), absent & (roster.group != FREE)
            away = self._occupy(net, message, roster, idle.nonzero().squeeze(1))
            if len(unread):
                if roster.arrive(unread[0], self.beta):
                    return unread[:1]
                due = roster.complete()
            elif bool(lost.any()):
                roster.group[lost] = FREE
                due = roster.complete()
            elif not bool((due := roster.overdue(int(nanoseconds(net.now)))).any()):
                before, until = net.now, float(roster.latest.min() / SECOND) if len(roster.latest) else math.inf
                events = await net.wait(until=until, anyone=away)
                if not len(events.arrived) and net.now == before:
                    break
                given_up = 0 if len(events.arrived) else given_up + len(events.lost)
                continue
            if bool(due.any()):
                roster.close(int(due.int().argmax()))
            if len(roster.buffer) and (bool(due.any()) or not len(roster.number)):
                taken, roster.buffer = roster.buffer, roster.buffer[:0]
                return net.arrived[np.isin(net.arrived["ticket"], taken.numpy())]
        return net.arrived[:0]

    def _occupy(self, net: Network, message: Tensors, roster: Roster, idle: Tensor) -> bool:
        """Give work to those of the ``idle`` clients who are there, the fastest first; whether some are away."""
        here = idle[net.there(idle)] if len(idle) else idle
        if len(here):
            here = here[roster.speed[here].argsort(stable=True)]
            steps = torch.tensor([self._assign(roster, i, int(nanoseconds(net.now))) for i in here.tolist()])
            net.send(here, "train", message, steps, self.patience)
        return len(here) < len(idle)

    def _assign(self, roster: Roster, i: int, t: int) -> int:
        """Local steps Q_i of client ``i``, who joins a group or creates one if it is known how fast it is."""
        s = float(roster.speed[i])
        if not s:
            return self.q_max
        q = ((roster.expected - t + SLACK) / s).floor()
        if bool((fits := (self.q_min <= q) & (q <= self.q_max)).any()):
            best = int(torch.where(fits, q, 0).argmax())
            roster.group[i] = roster.number[best]
            return int(q[best])
        fastest = torch.where(roster.group == roster.number[:, None], roster.speed, math.inf).amin(1)
        q = ((roster.latest - t + fastest * self.q_max + SLACK) / s).floor()
        q = q[(t < roster.latest) & (q <= self.q_max)]
        steps = max(self.q_min, int(q.max())) if len(q) else self.q_max
        roster.group[i] = roster.group.max().clamp(min=FREE) + 1
        roster.number = torch.cat([roster.number, roster.group[i : i + 1]])
        roster.expected = torch.cat([roster.expected, q.new_tensor([t + round(steps * s)])])
        roster.latest = torch.cat([roster.latest, q.new_tensor([t + round(self.lam * steps * s)])])
        return steps
