"""Rounds with a barrier: sample a cohort, have it train, average, repeat."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from hanse.core.errors import ConfigError
from hanse.core.messages import Reply, Tensors
from hanse.methods.base import Method
from hanse.schedules.network import Network, Schedule, start


class synchronous(Schedule):
    """Every round waits for its cohort: for all of it, or, with ``over`` or ``deadline``, for the first ones.

    Bonawitz et al.: "Towards Federated Learning at Scale: System Design", MLSys 2019, arXiv 1902.01046, sections 2 and 9, for
    over-selection, deadlines and the least number of clients without which a round is abandoned.
    """

    barrier: ClassVar[bool] = True

    cohort: PositiveInt = 10
    """Clients per round."""
    draw: Literal["fixed", "bernoulli"] = "fixed"
    """fixed: exactly ``cohort`` clients; bernoulli: each client on its own with probability cohort / clients."""
    over: NonNegativeFloat = 0.0
    """Ask this share of clients more than ``cohort``, go on with the first ``cohort`` replies, and call the others off."""
    deadline: PositiveFloat | None = None
    """Seconds after which a round goes on with the replies there are."""
    least: Annotated[int, Field(ge=0)] = 0
    """Fewest replies for which the model moves; with fewer, what came is thrown away."""

    @model_validator(mode="after")
    def _possible(self) -> synchronous:
        if self.least > self.cohort:
            raise ValueError(f"synchronous.least: {self.least} is not allowed: at most the cohort, {self.cohort}")
        return self

    def sampling(self) -> tuple[int, Literal["fixed", "bernoulli"]] | None:
        return (self.cohort, self.draw) if self._waits else None

    @property
    def _waits(self) -> bool:
        """Whether a round is for all of its cohort."""
        return not self.over and self.deadline is None and not self.least

    async def run(self, net: Network, method: Method) -> None:
        if self.cohort > net.clients:
            raise ConfigError(f"synchronous.cohort: {self.cohort} is not allowed: at most the number of clients, {net.clients}")
        state, _ = await start(net, method)
        while net.going():
            cohort = self._draw(net)
            if not len(cohort) and not len(net.sample(1)):  # nobody is there; a draw of nobody is a round of nobody
                await net.wait(anyone=True)
                cohort = self._draw(net)
            cohort = method.asked(state, cohort)
            reply = await self._ask(net, cohort, method.message(state), method.parts(state, cohort))
            if reply.counts:
                state = method.step(state, reply, net.round)
            await net.commit(state)

    async def _ask(self, net: Network, cohort: Tensor, message: Tensors, parts: Tensor | None) -> Reply:
        if self._waits:
            return await net.ask(cohort, "train", message, parts)
        end, due = math.inf if self.deadline is None else net.now + self.deadline, False
        net.send(cohort, "train", message, parts=parts)
        while len(net.out) and len(net.arrived) < self.cohort and not due:
            due = (await net.wait(self.cohort - len(net.arrived), end)).due
        net.call_off(net.out)
        taken = net.arrived[: self.cohort] if len(net.arrived) >= self.least else net.arrived[:0]
        reply = net.collect(taken)
        net.call_off(net.arrived)
        return reply

    def _draw(self, net: Network) -> Tensor:
        if self.draw == "fixed":
            return net.sample(math.ceil(self.cohort * (1 + self.over) - 1e-9))
        u = net.streams.uniform("draw", torch.zeros(1, dtype=torch.long), net.round, net.clients)[0]
        drawn = (u < self.cohort / net.clients).nonzero().squeeze(1)
        return drawn[net.there(drawn)]
