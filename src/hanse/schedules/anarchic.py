"""Anarchic federated learning: workers come when they like and work as long as they like; the server takes what it gets.

Yang, Zhang, Khanduri, Liu: "Anarchic Federated Learning", ICML 2022 (PMLR 162, 25331-25363), arXiv 2108.09875, Algorithm 1.

    worker i, whenever it likes:    fetch x_mu;   choose K_i;   K_i local steps;   send;   pause;   start again
    m workers have contributed:     the server takes all that has come and steps;   t <- t + 1

There are no rounds, no cohort and no timer: a round of the history is one step of the server. How long workers pause and how many
local steps they take is drawn for every job. Contributions are taken in the order of arrival, those of one instant by worker.

A batch has ``m`` distinct workers, but a fast one may have contributed several times by then. The paper leaves open what happens;
here all of it counts (our choice). For ``AFA_CS``, whose workers send differences from what they sent last, the sum of all of
them is exactly the difference to the newest, so counting all is keeping the newest. A worker whose job takes no time at all
contributes once a step.

The server steps with fewer than ``m`` workers where nobody else is left: when all who are not away have contributed or failed to,
or when there are ten times ``m`` contributions. Where nothing can come at all, the round stays empty.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from hanse.core.errors import ConfigError
from hanse.core.streams import Streams
from hanse.fleet.distributions import FINITE, FiniteAmount, constant
from hanse.fleet.population import Population
from hanse.methods.base import Method
from hanse.schedules.network import Network, Schedule, start

MOST = 10
"""Contributions for each of the ``m`` places after which a step is taken with fewer workers."""


class anarchic(Schedule):
    """Workers act on their own; a step whenever ``m`` of them have contributed."""

    m: PositiveInt | None = None
    """Distinct workers in a step; None: a tenth of all, at least one."""
    steps: tuple[PositiveInt, PositiveInt] | None = None
    """Fewest and most local steps K_i of a job, drawn anew for each, all numbers alike; None: as many as the rule says."""
    pause: FiniteAmount = constant(0)
    """Mean seconds between a worker's jobs, a number or a distribution over the workers; each pause is drawn exponentially."""
    oldest: NonNegativeInt | None = None
    """Staleness beyond which a contribution does not move the model, though it counts among the ``m``; None: any moves it."""
    patience: PositiveFloat = math.inf
    """Seconds after which a worker whose job brought no reply starts again; needed only where replies can be lost."""

    @model_validator(mode="after")
    def _ordered(self) -> anarchic:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"anarchic.steps: {self.steps} is not allowed: the fewest come first")
        return self

    async def run(self, net: Network, method: Method) -> None:
        m = self.m or max(1, net.clients // 10)
        if m > net.clients:
            raise ConfigError(f"anarchic.m: {m} is not allowed: at most the number of clients, {net.clients}")
        nobody = torch.zeros(net.clients, dtype=torch.bool)
        state, notes = await start(net, method, {"pausing": nobody, "jobs": nobody.long()})
        while net.going():
            pausing, jobs = notes["pausing"].clone(), notes["jobs"].clone()
            tried = torch.zeros_like(pausing)  # who has contributed or failed to
            while len(np.unique(net.arrived["client"])) < m and len(net.arrived) < MOST * m:
                here, away = _free(net, pausing)
                if bool(tried.any()) and bool(tried.index_fill(0, away, True).all()):
                    break
                if len(here):
                    net.send(here, "train", method.message(state), self._steps(net.streams, here, jobs[here]), self.patience)
                    jobs[here] += 1
                before = net.now
                events = await net.wait(anyone=len(away) > 0)
                pausing[events.rested] = False
                done = torch.from_numpy(np.concatenate([events.arrived["client"], events.lost["client"]]))
                tried[done] = True
                if len(done):
                    seconds = self._pauses(net, done, jobs[done])
                    pausing[done] = seconds > 0
                    net.rest(done[seconds > 0], seconds[seconds > 0])
                elif not len(events.rested) and net.now == before:
                    break  # nobody is there, and nobody will come
            versions = torch.from_numpy(net.arrived["version"].copy())
            scale = None if self.oldest is None else (net.round - versions <= self.oldest).double()
            reply = net.collect(net.arrived, scale)
            if len(reply):
                state = method.step(state, reply, net.round)
            notes = {"pausing": pausing, "jobs": jobs}
            await net.commit(state, notes)

    def _steps(self, streams: Streams, clients: Tensor, jobs: Tensor) -> Tensor | None:
        """K_i of each client's job with the number ``jobs`` ``[C]``."""
        if self.steps is None:
            return None
        fewest, most = self.steps
        return fewest + (streams.uniform("anarchic.steps", clients, jobs)[:, 0] * (most - fewest + 1)).long()

    def _pauses(self, net: Network, clients: Tensor, jobs: Tensor) -> Tensor:
        """Seconds each client pauses after so many jobs, float64 ``[C]``."""
        mean = FINITE.draw(self.pause, Population(net.streams, net.clients), clients, "anarchic.pause")
        if not bool(mean.any()):
            return mean
        return -mean * torch.log(net.streams.uniform("anarchic.pauses", clients, jobs)[:, 0])


def _free(net: Network, pausing: Tensor) -> tuple[Tensor, Tensor]:
    """Clients that neither work nor pause: those that are there, and those that are away."""
    free, at_once = ~pausing, net.arrived["sent"] == net.arrived["arrives"]
    free[net.out["client"]] = False
    free[net.arrived["client"][at_once]] = False  # or a job that takes no time would be repeated without end
    clients = free.nonzero().squeeze(1)
    there = net.there(clients)
    return clients[there], clients[~there]
