"""FedFix: the server steps at fixed times with whatever has arrived.

Fraboni, Vidal, Kameni, Lorenzi: "A General Theory for Federated Optimization with Asynchronous and Heterogeneous Clients Updates",
JMLR 24(110), 2023, arXiv 2206.10189.

    every dt seconds:   theta <- theta + server_lr * sum_i omega_i Delta_i,    omega_i = d_i if i delivered meanwhile, else 0
    d_i = p_i ceil(tau_i / dt)   (unbiased)      or      d_i = p_i   (plain, which counts fast clients more)

tau_i is the time client i needs. Whoever has delivered starts again with the new model, so client i delivers once in
ceil(tau_i / dt) windows; that number is measured (see ``periods``). With dt above the slowest client's time it is FedAvg. A window
in which nobody delivers leaves the model alone.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt

from hanse.fleet.clock import SECOND
from hanse.methods.base import Method
from hanse.schedules.network import Network, Schedule, start
from hanse.schedules.periods import measured, unknown_periods


class fedfix(Schedule):
    """A step every ``window`` seconds."""

    window: PositiveFloat = 1.0
    """Virtual seconds between two steps, dt."""
    cohort: PositiveInt | None = None
    """Clients at work at a time; None: all."""
    weights: Literal["unbiased", "plain"] = "unbiased"
    """unbiased: a client counts by how rarely it delivers, so that all count by their importance; plain: by its importance."""
    patience: PositiveFloat = math.inf
    """Seconds after which a job without a reply is given up."""

    async def run(self, net: Network, method: Method) -> None:
        state, notes = await start(net, method, unknown_periods(net.clients))
        # Up to whole nanoseconds, as virtual time is kept: a job of k windows, rounded to the nearest, has to fit into k of them.
        window = math.ceil(self.window * SECOND * (1 - 1e-12)) / SECOND
        while net.going():
            free = net.sample((self.cohort or net.clients) - len(net.out))
            if len(free):
                net.send(free, "train", method.message(state), patience=self.patience)
            end = net.now + window
            while not (await net.wait(net.clients, until=end)).due:
                pass
            jobs = net.arrived
            clients, versions = torch.from_numpy(jobs["client"]), torch.from_numpy(jobs["version"])
            notes, periods = measured(notes, clients, versions, net.round)
            reply = net.collect(jobs, periods if self.weights == "unbiased" else None, net.total_weight)
            if len(reply):
                state = method.step(state, reply, net.round)
            await net.commit(state, notes)
