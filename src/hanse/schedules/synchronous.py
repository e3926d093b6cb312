"""Rounds with a barrier: sample a cohort, have it train, average, repeat."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from hanse.core.errors import ConfigError
from hanse.methods.base import Method
from hanse.schedules.network import Network, Schedule


class synchronous(Schedule):
    """Every round waits for its whole cohort."""

    cohort: PositiveInt = 10
    """Clients per round."""
    draw: Literal["fixed", "bernoulli"] = "fixed"
    """fixed: exactly ``cohort`` clients; bernoulli: each client on its own with probability cohort / clients."""

    def expected_cohort(self) -> int:
        return self.cohort

    async def run(self, net: Network, method: Method) -> None:
        if self.cohort > net.clients:
            raise ConfigError(f"synchronous.cohort: {self.cohort} is not allowed: at most the number of clients, {net.clients}")
        state = net.begin(method.init(net.problem))
        for t in net.rounds():
            cohort = self._drawn(net, t) if self.draw == "bernoulli" else net.sample(self.cohort)
            if len(cohort):
                reply = await net.ask(cohort, "train", method.message(state))
                state = method.step(state, reply, t)
            await net.commit(state)

    def _drawn(self, net: Network, t: int) -> Tensor:
        u = net.streams.uniform("draw", torch.zeros(1, dtype=torch.long), t, net.clients)[0]
        return (u < self.cohort / net.clients).nonzero().squeeze(1)
