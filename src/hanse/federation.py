"""A federation: a task, split over clients, on a fleet."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from hanse.core.errors import ConfigError
from hanse.core.problem import Problem
from hanse.core.streams import Streams
from hanse.data.partition import Partition, iid
from hanse.data.task import Split, Task
from hanse.fleet.population import Population
from hanse.fleet.profiles import Fleet, ideal


class Federation:
    """``clients`` clients that hold the data of ``task`` split by ``partition``, on the devices of ``fleet``.

    Everything random follows ``seed``: the initial weights, the split and the fleet. Data are built on first use.
    """

    def __init__(
        self,
        task: Task,
        clients: int = 100,
        partition: Partition | None = None,
        fleet: Fleet | None = None,
        *,
        seed: int = 0,
        private: tuple[str, ...] = (),
        frozen: tuple[str, ...] = (),
        buffers: Literal["average", "domain", "private"] = "average",
        dtype: Literal["float32", "float64"] = "float32",
        device: str = "cpu",
    ) -> None:
        if clients < 1:
            raise ConfigError(f"clients: {clients} is not allowed: at least 1")
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
            raise ConfigError(f"device: {device!r} is not allowed: {str(error).splitlines()[0]}") from None
        if dtype not in ("float32", "float64"):
            raise ConfigError(f"dtype: {dtype!r} is not allowed: float32 or float64")
        self.task, self.clients, self.seed, self.device = task, clients, seed, device
        self.partition, self.fleet = partition or iid(), fleet or ideal()
        self.private, self.frozen, self.buffers = private, frozen, buffers
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.streams = Streams(seed)

    def settings(self) -> dict[str, str]:
        """What was asked for, as text from which ``Settings`` builds the same federation (but for the seed)."""
        return {
            "task": self.task.full(),
            "clients": str(self.clients),
            "partition": self.partition.full(),
            "fleet": self.fleet.full(),
            "private": " ".join(self.private),
            "frozen": " ".join(self.frozen),
            "buffers": self.buffers,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
        }

    def bare(self) -> Federation:
        """This one without its data and all that is made of them."""
        bare = copy.copy(self)
        for name in ("split", "population", "problem"):
            bare.__dict__.pop(name, None)
        return bare

    @cached_property
    def split(self) -> Split:
        """The clients' samples and the global test set."""
        split = self.partition.split(self.task.data(self.streams), self.clients, self.streams)
        return split.to(self.device, self.dtype)

    @cached_property
    def population(self) -> Population:
        """The clients as the fleet sees them."""
        return Population(self.streams, self.clients, self.split.groups)

    def _model(self, node: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # modules draw their weights from torch's global generator
            torch.manual_seed(self.streams.torch("weights", node).initial_seed())
            return self.task.model()

    def start(self, client: int) -> Tensor:
        """Initial shared weights ``[P]`` as if ``client`` had drawn them for itself; those of client 0 are the problem's."""
        return self.problem.shared_layout.flatten(dict(self._model(client).named_parameters())).to(self.problem.start)

    @cached_property
    def problem(self) -> Problem:
        """Model, loss and metrics, with initial weights drawn from the seed."""
        return Problem(
            self._model(0),
            self.task.loss,
            self.task.metrics,
            private=self.private,
            frozen=self.frozen,
            buffers=self.buffers,
            domains=0 if self.split.train.domains is None else int(self.split.train.domains.max()) + 1,
            sample=self.split.train.x.new_zeros(1, *self.split.train.x.shape[1:]),
            device=self.device,
            dtype=self.dtype,
        )
