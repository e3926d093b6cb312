"""Clients take turns: a fixed order, a cohort at a time, round and round.

Eichner, Koren, McMahan, Srebro, Talwar: "Semi-Cyclic Stochastic Gradient Descent", ICML 2019, arXiv 1904.10120, and Cho, Sharma,
Joshi, Xu, Kale, Zhang: "On the Convergence of Federated Averaging with Cyclic Client Participation", ICML 2023, arXiv 2302.03109.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import PositiveInt

from hanse.core.errors import ConfigError
from hanse.methods.base import Method
from hanse.schedules.network import Network, Schedule, start


class cyclic(Schedule):
    """Every client once in a cycle."""

    barrier: ClassVar[bool] = True

    cohort: PositiveInt = 10
    """Clients per round; the last cohort of a cycle may be smaller."""
    shuffle: bool = False
    """A new order in every cycle; False keeps the clients' own."""

    async def run(self, net: Network, method: Method) -> None:
        if self.cohort > net.clients:
            raise ConfigError(f"cyclic.cohort: {self.cohort} is not allowed: at most the number of clients, {net.clients}")
        state, _ = await start(net, method)
        turns = -(-net.clients // self.cohort)
        while net.going():
            cycle, turn = divmod(net.round, turns)
            order = torch.arange(net.clients)
            if self.shuffle:
                order = torch.from_numpy(net.streams.numpy("cycle", round=cycle).permutation(net.clients))
            cohort = order[turn * self.cohort : (turn + 1) * self.cohort].sort().values
            if not len(net.sample(1)):  # nobody at all is there, so that skipping turns would not pass any time
                await net.wait(anyone=True)
            reply = await net.ask(cohort[net.there(cohort)], "train", method.message(state))
            if len(reply):
                state = method.step(state, reply, net.round)
            await net.commit(state)
