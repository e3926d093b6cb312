"""A Ray cluster: actors that hold shards of the clients, models in the object store, sums added up in a tree.

What is sent is the same for all actors and gets to every node once. An actor has the data of its own clients alone. Ray starts an
actor that was lost again, elsewhere if need be, and repeats its work; nothing is remembered there, so that comes to the same bits.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from hanse.core.errors import ConfigError, HanseError, MissingExtraError, TransportError
from hanse.core.messages import Tensors
from hanse.core.wire import About, read, wire_size, write
from hanse.engines.base import Crew, Engine
from hanse.engines.execution import Executor, joined, keep_freed_memory
from hanse.engines.remote import Recipe, Remote, answer, data_of
from hanse.federation import Federation

TRIES = 20
"""How often an actor's work is repeated before the run ends; until Ray knows that a node is gone, it takes some tries a second."""

Bytes = NDArray[np.uint8]


class ray(Engine):
    """A Ray cluster, or Ray on this machine: as many actors as shards, each with the data of its own clients."""

    workers: PositiveInt = 2
    """Actors; also the number of shards."""
    threads: PositiveInt = 1
    """Threads inside one operation."""
    cpus: PositiveFloat = 1.0
    """Cores that Ray reserves for an actor."""
    address: str | None = None
    """An existing cluster, as in "ray://head:10001" or "auto"; None: start Ray on this machine."""

    @model_validator(mode="before")
    @classmethod
    def _one_shard_an_actor(cls, given: dict[str, Any]) -> dict[str, Any]:
        workers = given.get("workers", 2)
        if given.get("shards", workers) != workers:
            raise ValueError(f"ray.shards: {given['shards']} is not allowed: each of the {workers} actors has one")
        return {**given, "shards": workers}

    def crew(self, executor: Executor, federation: Federation) -> Crew:
        recipe = Recipe.of(executor, federation, self.precision == "bf16")
        samples, tests, numbers = executor.samples, executor.tests, torch.arange(federation.clients)
        shards = []
        for shard in range(self.shards):
            own = numbers % self.shards == shard
            shards.append(data_of(samples.some(own), tests.some(own)))
        return Remote(executor, Actors(recipe, shards, self))


def alone() -> dict[str, Any]:
    """How Ray starts on this machine: what this process can import, its actors can."""
    return {"include_dashboard": False, "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}}


def connected(address: str | None) -> Any:
    """The module ``ray`` with a cluster behind it; raises ``MissingExtraError`` or ``ConfigError`` without the one or the other."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of several actors one error is enough
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise MissingExtraError("engine ray", "ray") from None
    if not ray.is_initialized():
        IDLE.clear()
        try:
            ray.init(address=address, logging_level=logging.WARNING, **({} if address else alone()))
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"ray.address: {address!r} is not allowed: no cluster answers there: {error}") from None
    return ray


IDLE: dict[tuple[str, float], list[Any]] = {}
"""Actors that no run needs at the moment, by Ray's job and the cores they reserve; starting one means importing torch."""


class Shard:
    """An actor: the clients of one shard, at work on what comes. It can be lost at any time, and knows nothing that is not sent."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        self.run = ""

    def lane(self, run: str, made_of: tuple[Any, Any], lane: int, request: Bytes, kept: Bytes) -> tuple[Bytes, Bytes]:
        """Its lane of a request in a run ``made_of`` a recipe and a shard's data: the sums, and everything else."""
        if self.run != run:
            import ray

            recipe, data = ray.get([*made_of])
            self.run, self.executor = run, recipe.executor(read(_memory(data))[0])
        tensors, about = read(_memory(request))
        reply = answer(self.executor, tensors, about, lane, read(_memory(kept))[0])
        sums = {n: t for n, t in reply.items() if n.startswith("sums.")}
        return _bytes(sums), _bytes({n: t for n, t in reply.items() if n not in sums})


def merged(one: Bytes, other: Bytes) -> Bytes:
    """Two lanes' sums added up."""
    first, second = ({n: t.clone() for n, t in read(_memory(part))[0].items()} for part in (one, other))
    return _bytes(joined([first, second]))


def _memory(data: Bytes) -> Tensor:
    """Bytes of the object store, where they are; they can be read only, which is all that is done to what was sent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(data)


def _bytes(tensors: Tensors, about: About | None = None) -> Bytes:
    memory = torch.empty(wire_size(tensors, about=about), dtype=torch.uint8)
    write(memory, tensors, about)
    return memory.numpy()


class Actors:
    """``Hands`` of Ray actors."""

    replaced = 0  # Ray starts them again and tells nobody

    def __init__(self, recipe: Recipe, shards: list[Tensors], engine: ray) -> None:
        self.ray = connected(engine.address)
        remote = self.ray.remote(num_cpus=engine.cpus, scheduling_strategy="SPREAD", max_restarts=-1, max_task_retries=TRIES)(Shard)
        self.merge = self.ray.remote(num_cpus=0, max_retries=TRIES)(merged)
        self.run, cooked = uuid4().hex, self.ray.put(recipe)
        self.made_of = [(cooked, self.ray.put(_bytes(data))) for data in shards]
        place = (self.ray.get_runtime_context().get_job_id(), engine.cpus)
        for others in [key for key in IDLE if key != place]:
            for actor in IDLE.pop(others) if others[0] == place[0] else []:
                self.ray.kill(actor)  # they keep cores that these may need
        self.idle = IDLE.setdefault(place, [])
        self.actors = [self.idle.pop() if self.idle else remote.remote() for _ in shards]

    def work(self, tensors: Tensors, about: About, kept: Mapping[int, Tensors]) -> list[Tensors]:
        """See ``Hands``."""
        request = self.ray.put(_bytes(tensors, about))
        parts = [
            self.actors[lane].lane.options(num_returns=2).remote(self.run, self.made_of[lane], lane, request, _bytes(rows))
            for lane, rows in kept.items()
        ]
        try:
            total = self._total([sums for sums, _ in parts])
            replies = [self._own(reply) for reply in self.ray.get([rest for _, rest in parts])]
            replies[0] |= self._own(self.ray.get(total))
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, HanseError) else error) from None
        except self.ray.exceptions.RayError as error:
            raise TransportError(f"engine: an actor was lost with its clients {TRIES + 1} times: {error}") from None
        return replies

    def _total(self, sums: list[Any]) -> Any:
        """The sums of all lanes, added up in the order of ``joined`` where they are."""
        while len(sums) > 1:
            pairs = [sums[i : i + 2] for i in range(0, len(sums), 2)]
            sums = [self.merge.remote(*pair) if len(pair) > 1 else pair[0] for pair in pairs]
        return sums[0]

    def _own(self, reply: Bytes) -> Tensors:
        """A message in this process's own memory."""
        return read(torch.from_numpy(reply.copy()))[0]

    def close(self) -> None:
        """See ``Hands``."""
        self.idle += self.actors
        self.actors = []
