"""A federation in virtual time: a deterministic queue of events here, clients' work wherever the engine has it done."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hanse.attacks import Attack
from hanse.codecs.base import Codec, identity
from hanse.core.errors import ConfigError, DivergedError
from hanse.core.gradients import paths
from hanse.core.messages import Reply, Tensors
from hanse.core.state import ClientState
from hanse.engines.adversaries import Adversaries
from hanse.engines.arrangement import fastest
from hanse.engines.base import Arrangement, Crew, Engine
from hanse.engines.execution import Executor, Lane, Orders, side_by_side, weights_of
from hanse.engines.mechanisms import Mechanisms
from hanse.engines.peers import Peers
from hanse.engines.pending import Collected
from hanse.federation import Federation
from hanse.fleet.clock import NEVER, Clock, Jobs
from hanse.methods.base import Method
from hanse.privacy import Privacy
from hanse.schedules.network import Schedule


def client_state(federation: Federation, method: Method, folder: Path | None) -> ClientState:
    """What the clients of a run keep, at its start; in files in ``folder`` if there is one."""
    problem, initial = federation.problem, dict(method.kept(federation.problem, federation.population))
    if problem.layout.size > problem.shared:
        initial["private"] = problem.start[problem.shared :]
    if problem.buffer_layout.size and not problem.shares_buffers:
        initial["buffers"] = problem.start_buffers
    widths = {name: rows.shape[-1] for name, rows in initial.items()}
    return ClientState(federation.clients, widths, problem.dtype, problem.device, initial, folder)


class Simulation(Peers):
    """The network of a run in virtual time: it has work executed in batches, and knows what all clients keep.

    ``attack``: what some of the clients do to the others. ``schedule`` is who will use it, which ``privacy`` depends on.
    """

    def __init__(
        self,
        federation: Federation,
        method: Method,
        engine: Engine,
        codec: Codec,
        down: Codec | None = None,
        *,
        seed: int,
        rounds: int,
        seconds: float = math.inf,
        privacy: Sequence[Privacy] = (),
        attack: Attack | None = None,
        schedule: Schedule | None = None,
        on_commit: Callable[[Simulation], None] = lambda net: None,
    ) -> None:
        streams = federation.streams if seed == federation.seed else type(federation.streams)(seed)
        clock = Clock(federation.fleet, federation.population, streams)
        self._files = tempfile.TemporaryDirectory(prefix="hanse-") if engine.kept == "disk" else None
        kept = client_state(federation, method, Path(self._files.name) if self._files else None)
        super().__init__(
            federation,
            method,
            engine,
            codec,
            down or identity(),
            clock,
            kept,
            seed=seed,
            rounds=rounds,
            seconds=seconds,
            on_commit=on_commit,
        )
        self.paths = paths(self.problem, engine.precision == "bf16")
        if engine.path is not None and engine.path not in self.paths:
            raise ConfigError(f"{engine.short_name}.path: {engine.path!r} is not allowed for this model: {', '.join(self.paths)}")
        self.privacy = (
            Mechanisms(privacy, schedule or Schedule(), method, self.codec, federation, self.streams) if privacy else None
        )
        self.adversaries = None if attack is None else Adversaries(attack, self.clients, self.streams)
        if self.adversaries is not None:
            if self.adversaries.attack.damages and privacy:
                raise ConfigError(
                    f"attack: {attack} is not allowed with privacy: there are no codecs whose messages could be damaged"
                )
            self.samples = self.adversaries.attack.poison(self.samples, self.adversaries.liars, self.streams)
        self.executor = Executor(
            self.problem,
            self.samples,
            federation.split.test,
            method,
            self.codec,
            self.streams,
            self.kept,
            self.paths,
            engine.shortcuts,
            self.privacy,
            self.adversaries,
        )
        self._mark()
        self._back = np.full(self.clients, -math.inf)
        if self.privacy is not None:
            self._try_privacy()

    def _try_privacy(self) -> None:
        """One step of the client with the fewest samples: what cannot be kept private is refused before any work."""
        counts, zero = self.samples.counts(), torch.zeros(1, dtype=torch.long)
        who = torch.where(counts > 0, counts, counts.max() + 1).argmin()[None]
        message = self.method.message(self.method.init(self.problem))
        orders = Orders("train", [message], zero, who, zero, zero, zero + 1, zero)
        honest = copy.copy(self.executor)
        honest.adversaries = None
        honest.run(orders, Arrangement("loop", 1, 1, torch.get_num_threads()), total=True)

    @cached_property
    def crew(self) -> Crew:
        """Who does the clients' work."""
        return self.engine.crew(self.executor, self.federation)

    def failures(self) -> dict[str, int]:
        """See ``Rounds``; and workers that were ``replaced``."""
        return {**super().failures(), "replaced": self.crew.replaced if "crew" in self.__dict__ else 0}

    def close(self) -> None:
        """No more work will come."""
        if "crew" in self.__dict__:
            self.crew.close()

    def there(self, clients: Tensor) -> Tensor:
        return self.federation.fleet.trace.online(self.federation.population, clients, self.now, self.round)

    def back(self) -> float:
        """When the next client that is away comes back; of very many clients, some are asked."""
        trace = self.federation.fleet.trace
        if trace.counts_rounds:
            return math.inf
        ids = self.streams.sample("back", self.clients, min(self.clients, 10_000), self.round)
        ids = ids[~torch.isin(ids, torch.from_numpy(self.out["client"]))]
        away = ids[~self.there(ids)]
        asked = away[torch.from_numpy(self._back[away.numpy()] <= self.now)]  # of the others it is known already
        self._back[asked.numpy()] = trace.back(self.federation.population, asked, self.now).numpy()
        return float(max(self._back[away.numpy()].min(initial=math.inf), self.now + 1e-6))

    async def ask(self, clients: Tensor, work: str, message: Tensors, parts: Tensor | None = None) -> Reply:
        if self.clock.still:  # there are no events to keep
            lanes, starts = self._at_once(clients, work, message, parts)
        else:
            jobs = self._send(clients, work, message, None, math.inf, parts)
            coming = jobs[jobs["arrives"] < NEVER]
            lanes = self._execute(coming, total=True) if len(coming) else []
            self.clock.weigh(*weights_of(lanes))
            while bool((self.out["ticket"] >= jobs["ticket"].min(initial=NEVER)).any()):
                await self.wait(replies=len(jobs))
            starts = self._starts(self.clock.take(jobs["ticket"]))
        self._enough(side_by_side([batch.upload.clients for lane in lanes for batch in lane.batches], clients[:0]))
        self._keep(lanes)
        return self._reply(starts, Collected(lanes, [], None), None)

    def _at_once(self, clients: Tensor, work: str, message: Tensors, parts: Tensor | None) -> tuple[list[Lane], dict[int, Tensors]]:
        messages, sizes = self.downlink.send(message, clients, parts, self.round)
        sizes += self._agree(clients)
        keys, versions = torch.from_numpy(self._keys(clients.numpy())), torch.full_like(clients, self.round)
        which = torch.zeros_like(clients) if len(messages) == 1 else torch.arange(len(clients))
        orders = Orders(work, messages, clients, clients, keys, versions, self.plan.lengths(self.samples.counts(clients)), which)
        lanes = self.perform(orders, total=True) if len(clients) else []
        self.clock.exchange(sizes, weights_of(lanes)[1])
        return lanes, {self.round: messages[0]} if messages else {}

    # ---- execution

    def execute_all(self) -> None:
        """Everything that has come or will come back is executed together, whatever version it started from."""
        jobs = np.concatenate([self.clock.arrived, self.clock.out])
        due = jobs[(jobs["known"] == 0) & (jobs["arrives"] < NEVER)]
        due = due[np.argsort(due["ticket"])]
        works = np.array([self.pending.messages[i].work for i in due["message"].tolist()])
        for work in dict.fromkeys(works.tolist()):
            jobs = due[works == work]
            lanes = self._execute(jobs, total=False)
            self.clock.weigh(*weights_of(lanes))
            self.pending.store(lanes)

    def _execute(self, jobs: Jobs, total: bool) -> list[Lane]:
        same = bool((jobs["message"] == jobs["message"][0]).all())
        numbers, which = (
            (jobs["message"][:1], np.zeros(len(jobs), int)) if same else np.unique(jobs["message"], return_inverse=True)
        )
        messages = [self.pending.messages[i] for i in numbers.tolist()]
        tickets, clients, keys, versions, steps = (
            torch.from_numpy(jobs[name].copy()) for name in ("ticket", "client", "key", "version", "steps")
        )
        tensors, place = [m.tensors for m in messages], torch.from_numpy(which)
        share = torch.from_numpy(jobs["share"].copy()) if jobs["share"].any() else None
        return self.perform(Orders(messages[0].work, tensors, tickets, clients, keys, versions, steps, place, share), total)

    def perform(self, orders: Orders, total: bool) -> list[Lane]:
        if self.arrangement is None:
            self.arrangement = fastest(self, replace(orders, work="train"))  # an opening is over at once
            self.engine = type(self.engine)(**{**dict(self.engine), **self.arrangement._asdict()})
        self.on_phase("waiting")
        lanes = self.crew.run(orders, self.arrangement, total)
        batches = [batch for lane in lanes for batch in lane.batches]
        loss = side_by_side([b.upload.loss for b in batches], self.problem.start)
        finite = math.isfinite(float(loss.double().sum()))
        self.on_phase("stepping")  # not before a number was asked for: an accelerator is still at work until then
        if not finite:
            who = side_by_side([b.upload.clients for b in batches], orders.clients)
            bad = int(who[~torch.isfinite(loss.cpu())][0])
            raise DivergedError(
                f"training loss of client {bad} in round {self.round + 1} is not finite; lower lr ({self.method.lr}) or set clip"
            )
        return lanes
