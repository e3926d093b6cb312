"""FedBuff and FedAsync: the server steps when a buffer of replies is full; clients never wait for one another.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba: "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022,
arXiv 2106.06639, and Xie, Koyejo, Gupta: "Asynchronous Federated Optimization", arXiv 1903.03934.

    a reply of client i arrives, from version rho_i:    buffer <- buffer + s(n - rho_i) Delta_i
    c replies are in the buffer:                        x <- x + (server_lr / c) buffer;   buffer <- 0;   n <- n + 1
    whoever is free starts again at once from the current model

FedAsync is c = 1, with alpha s(u) instead of s(u). Its original step moves towards the client's model instead of along its
displacement: that is the method ``FedAsync``. ``weights = "unbiased"`` counts each client by how rarely it delivers
(see ``periods``) instead of by its staleness; the two contradict each other. Replies of the same instant are taken together.
Clients whose rule weighs them by their samples are averaged in the buffer by these; c is then the sum of the weights.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from hanse.methods.base import Method
from hanse.schedules.network import Network, Schedule, occupy, start
from hanse.schedules.periods import measured, unknown_periods
from hanse.schedules.staleness import Staleness, discounted, polynomial


class fedbuff(Schedule):
    """A step whenever ``buffer`` replies are in."""

    buffer: PositiveInt = 10
    """Replies in a step, c."""
    cohort: PositiveInt | None = None
    """Clients at work at a time; None: all."""
    staleness: Staleness = polynomial(0.5)
    """What an update counts that started from an old model."""
    alpha: PositiveFloat = 1.0
    """Factor on every update."""
    weights: Literal["staleness", "unbiased"] = "staleness"
    """staleness: alpha s(u); unbiased: by how rarely a client delivers, so that all count by their importance."""
    oldest: NonNegativeInt | None = None
    """Staleness beyond which an update does not move the model; None: any may."""
    patience: PositiveFloat = math.inf
    """Seconds after which a job without a reply is given up."""

    @model_validator(mode="after")
    def _one_of_both(self) -> fedbuff:
        fields = type(self).model_fields
        given = [name for name in ("staleness", "alpha", "oldest") if getattr(self, name) != fields[name].default]
        if self.weights == "unbiased" and given:
            raise ValueError(f"{type(self).__name__}.{given[0]} is not allowed with weights='unbiased': it would bias it again")
        return self

    async def run(self, net: Network, method: Method) -> None:
        unbiased = self.weights == "unbiased"
        state, notes = await start(net, method, unknown_periods(net.clients) if unbiased else {})
        cohort = self.cohort or net.clients
        while net.going():
            lost = 0  # given up one after the other
            while len(net.arrived) < self.buffer and lost < cohort:
                events = await occupy(net, cohort, method.message(state), self.patience)
                if events is None:
                    break  # nobody is there, or nothing of what is out will come: the round ends with what there is
                lost = 0 if len(events.arrived) else lost + len(events.lost)
            jobs = net.arrived[: self.buffer]
            versions = torch.from_numpy(jobs["version"])
            if unbiased:
                notes, scale = measured(notes, torch.from_numpy(jobs["client"]), versions, net.round)
                reply = net.collect(jobs, scale, net.total_weight)
            else:
                reply = net.collect(jobs, self.alpha * discounted(self.staleness, net.round - versions, self.oldest))
            if len(reply):
                state = method.step(state, reply, net.round)
            await net.commit(state, notes)


class fedasync(fedbuff):
    """A step at every reply."""

    buffer: Literal[1] = 1
    """One reply in a step."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Factor on every update."""
