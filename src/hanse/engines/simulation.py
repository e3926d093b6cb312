"""A federation in virtual time: a deterministic queue of events here, clients' work wherever the engine has it done."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanse.attacks import Attack
from hanse.codecs.base import Codec, Links, identity
from hanse.core.dropout import unkeyed
from hanse.core.errors import CheckpointError, ConfigError, DivergedError
from hanse.core.gradients import paths
from hanse.core.messages import Reply, Tensors
from hanse.core.state import ClientState
from hanse.core.wire import grouped, nested
from hanse.engines.adversaries import Adversaries
from hanse.engines.arrangement import fastest
from hanse.engines.base import Arrangement, Crew, Engine
from hanse.engines.downlink import Downlink
from hanse.engines.exchange import Exchanges
from hanse.engines.execution import Executor, Lane, Orders, keep_freed_memory, side_by_side, weights_of
from hanse.engines.mechanisms import Mechanisms
from hanse.engines.pending import Collected, Pending
from hanse.engines.programs import Outcome, Programs
from hanse.federation import Federation
from hanse.fleet.clock import NEVER, Clock, Events, Jobs, among, nanoseconds
from hanse.fleet.profiles import Work
from hanse.methods.base import Method, State
from hanse.privacy import Privacy
from hanse.schedules.network import Schedule
from hanse.schedules.peers import Node
from hanse.topologies import Mixing


class Absent(dict[Any, Any]):
    """What of a reply there is not without a server; a rule that asks for it is refused."""

    def __init__(self, method: Method, what: str) -> None:
        super().__init__()
        self.method, self.what = method, what

    def __missing__(self, name: object) -> Any:
        raise ConfigError(f"method: {self.method} is not allowed without a server: it asks for the {self.what} of all replies")


SHARE_BYTES = 8
"""What a message is longer by that says what part of its entries a client may send."""

FORMAT = 5
"""Version of a checkpoint's layout; one that reads differently counts up."""


def alike(one: Tensors, other: Tensors) -> bool:
    """Whether names, shapes and types agree."""
    return {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}


def continues(saved: Tensors, start: Tensors) -> bool:
    """Whether ``saved`` can have come of ``start``: alike, but that tables without a row at first may have some by now."""
    tables = {n: t[:0] if start[n].dim() and not len(start[n]) else t for n, t in saved.items() if n in start}
    return saved.keys() == start.keys() and alike(tables, start)


def ruled(rules: Codec | None, given: Codec, field: str, method: Method) -> Codec:
    """The codec of a rule that says how its messages are written, or the one that is ``given``; raises ``ConfigError`` at both."""
    if rules is None or given == rules:
        return given
    if not given.plain:
        raise ConfigError(f"{field}: {given} is not allowed with {method}: its messages are written by {rules}")
    return rules


class Simulation:
    """The network of one run: it executes work in batches and keeps virtual time, traffic and what clients remember.

    ``on_commit(network)`` is called after every round; setting ``stopping`` ends the run after the current one. ``seconds``: end
    it when virtual time is that far. ``attack``: what some of the clients do to the others. ``schedule`` is who will use it, which
    ``privacy`` depends on.
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
        keep_freed_memory()
        if down is not None and down != method.down and (down.keeps or down.sparse):
            raise ConfigError(f"down: {down} is not allowed: it carries the model itself, so every number has to be sent")
        self.federation, self.method, self.engine = federation, method, engine
        self.codec, self.down = ruled(method.codec, codec, "codec", method), ruled(method.down, down or identity(), "down", method)
        self.problem, self.samples, self.clients = federation.problem, federation.split.train, federation.clients
        self.streams = federation.streams if seed == federation.seed else type(federation.streams)(seed)
        loose = unkeyed(self.problem.model) if method.batched else []
        if loose:
            raise ConfigError(
                f"dropout of {', '.join(loose)} is not allowed: it draws from a global generator, so runs would not repeat; "
                "set it to 0, or train by a OneByOne rule"
            )
        self.plan = method.plan()
        self.round, self.total_rounds, self.seconds, self.on_commit = 0, rounds, seconds, on_commit
        self.taken, self.keys = torch.zeros(self.clients, dtype=torch.int32), np.full(self.clients, -1, dtype=np.int32)
        self.cohort, self.loss, self.staleness, self.updates = torch.zeros(0, dtype=torch.long), math.nan, 0.0, 0
        self.arrangement = engine.fixed()
        self.paths = paths(self.problem, engine.precision == "bf16")
        if engine.path is not None and engine.path not in self.paths:
            raise ConfigError(f"local.path: {engine.path!r} is not allowed for this model: {', '.join(self.paths)}")
        self.kept = self._client_state()
        self.clock = Clock(federation.fleet, federation.population, self.streams)
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
        self.downlink = Downlink(self.down, self.executor.layout_of, self.streams)
        self.pending = Pending()
        self.flops = 0.0 if self.clock.timeless else self.problem.sample_flops(self.samples.x[:1]) * method.gradients
        self.footprint = self._footprint()
        self.state: State = {}
        self.mixing: Mixing | None = None
        """The weights of the first exchange between peers."""
        self.notes: Tensors = {}
        self.letters: dict[str, list[int]] = {}
        """Messages and bytes by kind that peers' programs have sent so far."""
        self._losses: list[tuple[float, float]] = []
        self.stopping = False
        self._draws = 0
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

    def _client_state(self) -> ClientState:
        problem, initial = self.problem, dict(self.method.kept(self.problem, self.federation.population))
        if problem.layout.size > problem.shared:
            initial["private"] = problem.start[problem.shared :]
        if problem.buffer_layout.size and not problem.shares_buffers:
            initial["buffers"] = problem.start_buffers
        widths = {name: rows.shape[-1] for name, rows in initial.items()}
        self._files = tempfile.TemporaryDirectory(prefix="hanse-") if self.engine.kept == "disk" else None
        where = Path(self._files.name) if self._files else None
        return ClientState(self.clients, widths, problem.dtype, problem.device, initial, where)

    @cached_property
    def crew(self) -> Crew:
        """Who does the clients' work."""
        return self.engine.crew(self.executor, self.federation)

    def close(self) -> None:
        """No more work will come."""
        if "crew" in self.__dict__:
            self.crew.close()

    @property
    def personal(self) -> bool:
        """Whether clients' models differ in private parameters or statistics."""
        shared = self.problem.shared_buffers
        return "private" in self.kept.widths or "buffers" in self.kept.widths or shared.dim() > 1

    @property
    def model(self) -> Tensor:
        """The global model ``[P]``: among peers the mean of all honest ones."""
        x = self.state["x"]
        return x if x.dim() == 1 else x[self.honest].mean(0)

    @property
    def honest(self) -> Tensor:
        """Who does not lie, bool ``[N]``."""
        return torch.ones(self.clients, dtype=torch.bool) if self.adversaries is None else ~self.adversaries.liars

    # ---- what a schedule sees

    @property
    def now(self) -> float:
        return self.clock.now

    @property
    def out(self) -> Jobs:
        return self.clock.live

    @property
    def arrived(self) -> Jobs:
        return self.clock.arrived

    def begin(self, state: State, notes: Tensors | None = None) -> tuple[State, Tensors]:
        if not self.state:
            self.state, self.notes = state, notes or {}
        elif not continues(self.state, state) or (notes or {}).keys() != self.notes.keys():
            raise CheckpointError("the checkpoint does not belong to this run: another rule, or another type of weights")
        return self.state, self.notes  # a resumed run brought its own

    def going(self) -> bool:
        self.cohort, self.staleness = self.cohort[:0], 0.0
        return not self.finished and not self.stopping

    @property
    def finished(self) -> bool:
        """Whether the run has all its rounds, or all its virtual seconds."""
        return self.round >= self.total_rounds or self.now >= self.seconds

    def sample(self, k: int) -> Tensor:
        busy = np.sort(self.out["client"])
        free = self.clients - len(busy)
        k, self._draws = min(k, free), self._draws + 1
        drawn = self._there(self.streams.sample("cohort", free, k, self.round, self._draws - 1), busy)
        size = k
        while len(drawn) < k and size < free:  # some are away: ask more, in an order of their own
            size = min(4 * size, free)
            asked = self.streams.numpy("cohort.more", self._draws, self.round).choice(free, size, replace=False)
            drawn = self._there(torch.from_numpy(asked), busy)[:k].sort().values
        return drawn

    def _there(self, places: Tensor, busy: np.ndarray) -> Tensor:
        """Those of the clients at ``places`` among the free ones who are there."""
        if len(busy):
            before = np.searchsorted(busy - np.arange(len(busy)), places.numpy(), side="right")  # those at work up to there
            places = places + torch.from_numpy(before)
        here = self.there(places)
        return places if bool(here.all()) else places[here]

    def there(self, clients: Tensor) -> Tensor:
        return self.federation.fleet.trace.online(self.federation.population, clients, self.now, self.round)

    @property
    def counts(self) -> Tensor:
        return self.samples.counts()

    @cached_property
    def total_weight(self) -> float:
        return float(self.method.weight(self.samples.counts().to(self.problem.dtype)).sum())

    def send(
        self,
        clients: Tensor,
        work: str,
        message: Tensors,
        steps: Tensor | None = None,
        patience: float = math.inf,
        parts: Tensor | None = None,
    ) -> None:
        self._send(clients, work, message, steps, patience, parts)

    def _send(
        self, clients: Tensor, work: str, message: Tensors, steps: Tensor | None, patience: float, parts: Tensor | None
    ) -> Jobs:
        task, who = self._task(clients, steps), clients.numpy()
        if len(self.arrived) and (self.kept.widths or self.codec.keeps):
            self._execute_unless_known(self.arrived["client"], who)
            self.pending.remember(self.arrived["ticket"][among(self.arrived["client"], who)], self.kept)
        messages, sizes = self.downlink.send(message, clients, parts, self.round)
        share = self.shares(clients)
        sizes += self._agree(clients) + (0 if share is None else SHARE_BYTES)
        numbers = np.array([self.pending.post(work, message) for message in messages])
        return self.clock.send(clients, self.round, self._keys(who), numbers, sizes, task, patience, share)

    def _task(self, clients: Tensor, steps: Tensor | None) -> Work:
        """What ``clients`` have to compute in so many local steps, or as many as the rule says."""
        counts = self.samples.counts(clients)
        lengths = self.plan.lengths(counts) if steps is None else steps
        return Work(lengths, self.flops * self.plan.seen(counts, lengths) if self.flops else lengths.new_zeros(1), self.footprint)

    def shares(self, clients: Tensor) -> Tensor | None:
        """What part of its entries each client may send, if the codec has the server decide that by the cohort's links."""
        links = self.clock.links(clients) if len(clients) else None
        return None if links is None else self.codec.allot(Links(*links), self.problem.shared)

    def _agree(self, clients: Tensor) -> int:
        """Bytes to each of ``clients`` beside its message, for what keeps them private in this exchange."""
        return 0 if self.privacy is None else self.privacy.ask(clients)

    def _keys(self, who: np.ndarray, round: int | np.ndarray | None = None) -> np.ndarray:
        """What the chance of the next job of each client is drawn for: the round, or later if it has had this version before."""
        before = self.keys[who]
        keys: np.ndarray = np.maximum(self.round if round is None else round, before + 1, dtype=np.int64)
        self._sent.append((who, before))
        self.keys[who] = keys
        return keys

    def _footprint(self) -> float:
        """Bytes a client needs to train: weights, gradient, the optimiser's vectors, and what it keeps."""
        vectors = 2 + len(self.method.local.slots(self.problem.start[:1]))
        return (vectors * self.problem.layout.size + sum(self.kept.widths.values())) * self.problem.start.element_size()

    async def wait(self, replies: int = 1, until: float = math.inf, anyone: bool = False) -> Events:
        sooner = min(until, self._somebody_back()) if anyone else until
        events = self.clock.advance(replies, sooner, self._execute_all)
        return events if sooner == until else events._replace(due=False)

    def _somebody_back(self) -> float:
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

    def call_off(self, jobs: Jobs) -> None:
        self.clock.call_off(jobs["ticket"][~among(jobs["ticket"], self.arrived["ticket"])])
        self._execute_unless_known(self.arrived["ticket"], jobs["ticket"])  # it has travelled all the same
        self.clock.call_off(jobs["ticket"])
        self.pending.forget(self.clock)

    def rest(self, clients: Tensor, seconds: Tensor) -> None:
        self.clock.rest(clients, seconds)

    def collect(self, jobs: Jobs, scale: Tensor | None = None, total: float | None = None) -> Reply:
        self._execute_unless_known(self.arrived["ticket"], jobs["ticket"])
        if len(jobs):  # of a round that is thrown away nothing is unmasked
            self._enough(torch.from_numpy(jobs["client"].copy()))
        self.pending.remember(jobs["ticket"], self.kept)
        found = self.pending.take(jobs["ticket"], scale)
        return self._reply(self._starts(self.clock.take(jobs["ticket"])), found, total)

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

    def _keep(self, lanes: list[Lane]) -> None:
        for batch in (batch for lane in lanes for batch in lane.batches if batch.kept):
            self.kept.write(batch.upload.clients, batch.kept)

    def _at_once(self, clients: Tensor, work: str, message: Tensors, parts: Tensor | None) -> tuple[list[Lane], dict[int, Tensors]]:
        messages, sizes = self.downlink.send(message, clients, parts, self.round)
        sizes += self._agree(clients)
        keys, versions = torch.from_numpy(self._keys(clients.numpy())), torch.full_like(clients, self.round)
        which = torch.zeros_like(clients) if len(messages) == 1 else torch.arange(len(clients))
        orders = Orders(work, messages, clients, clients, keys, versions, self.plan.lengths(self.samples.counts(clients)), which)
        lanes = self._perform(orders, total=True) if len(clients) else []
        self.clock.exchange(sizes, weights_of(lanes)[1])
        return lanes, {self.round: messages[0]} if messages else {}

    # ---- among peers

    @cached_property
    def exchanges(self) -> Exchanges:
        """What travels between peers; of a run with a server, nothing. Raises ``ConfigError`` on settings that mean a server."""
        if not self.down.plain:
            raise ConfigError(f"down: {self.down} is not allowed between peers: what they send is written by codec")
        if self.method.robust:
            raise ConfigError(f"aggregate: {self.method.aggregate} is not allowed between peers: use merge=robust(...) of gossip")
        if self.adversaries is not None and self.adversaries.attack.damages:
            raise ConfigError(
                f"attack: {self.adversaries.attack} is not allowed between peers: their messages are not encoded here"
            )
        return Exchanges(self.codec, self.problem.shared_layout, self.clock, self.streams, self.clients)

    @property
    def traffic(self) -> Tensor | None:
        """What each node has sent and received, bytes, int64 ``[N, 2]``; None with a server, to and from whom everything goes."""
        return self.exchanges.traffic if "exchanges" in self.__dict__ else None

    def starts(self) -> Tensor:
        return torch.stack([self.federation.start(client) for client in range(self.clients)])

    async def work(self, nodes: Tensor, work: str, message: Tensors, patience: float = math.inf) -> Reply:
        (done, over), last = (
            self.clock.finish(nodes, self._task(nodes, None)),
            min(self.clock.time + int(nanoseconds(patience)), NEVER),
        )
        there = torch.from_numpy(done <= min(last, NEVER - 1))
        waited = last if last < NEVER and not bool(there.all()) else int(over[over < NEVER].max(initial=0))
        self.clock.go_on(waited)
        ids, rows = nodes[there], {n: t[there] for n, t in message.items()}
        lanes = self._locally(work, ids, rows, torch.full_like(ids, self.round))
        self._keep(lanes)
        return self._among_peers(lanes, trained=work == "train")

    def _locally(self, work: str, nodes: Tensor, message: Tensors, rounds: Tensor) -> list[Lane]:
        """What ``nodes`` make of their rows of ``message``; their learning rates are those of ``rounds``. Nothing is kept yet.

        Work other than training has purposes of its own to draw for.
        """
        keys = torch.from_numpy(self._keys(nodes.numpy(), rounds.numpy())) if work == "train" else rounds
        steps, which = self._task(nodes, None).steps, torch.arange(len(nodes))
        orders = Orders(work, [message], nodes, nodes, keys, rounds, steps, which, own=True)
        return self._perform(orders, total=False) if len(nodes) else []

    def _among_peers(self, lanes: list[Lane], trained: bool) -> Reply:
        """The reply of nodes that are their own servers: it has nothing that only a server of all would have."""
        reply = self._reply({}, Collected(lanes, [], None), None, lambda rows, weights: rows, trained)
        return replace(reply, sums=Absent(self.method, "sums"), starts=Absent(self.method, "starts"))

    async def exchange(self, models: Tensor, mixing: Mixing, before: Tensor | None) -> tuple[Tensor, Mixing]:
        self.mixing = self.mixing or mixing
        if self.adversaries is None:
            return self.exchanges.send(models, mixing, self.round)
        if before is None and self.adversaries.attack.forges:
            raise ConfigError(
                f"attack: {self.adversaries.attack} is not allowed here: nobody has learned anything yet to lie about"
            )
        everyone, rounds = torch.arange(len(models)), torch.full((len(models),), self.round)
        start = models if before is None else before
        told = self.adversaries.models(start, models, everyone, rounds, self.problem.shared_layout)
        good = told.isfinite().all(1)
        arrived, weights = self.exchanges.send(torch.where(good[:, None], told, 0), mixing, self.round)
        return arrived, weights.losing(~good.cpu()[weights.neighbours])

    async def play(self, program: Callable[[Node], Coroutine[Any, Any, None]]) -> None:
        programs = Programs(
            self.federation,
            self.clock,
            self.streams,
            self.codec,
            self.exchanges.traffic,
            lambda nodes: self._task(nodes, None),
            self._trained,
            self._finished,
            self._played,
            self.state["x"],
        )
        self.letters = programs.counts
        programs.play(program, self.seconds)

    def _trained(self, nodes: Tensor, models: Tensor, rounds: Tensor) -> list[Outcome]:
        """What comes of ``models`` ``[C, P]`` in the work of ``nodes``; nothing is written down yet."""
        lanes = self._locally("train", nodes, self.method.message({"x": models}), rounds)
        reply = self._among_peers(lanes, trained=False)
        order, everyone = nodes.argsort(), torch.arange(len(nodes))
        at = order[torch.searchsorted(nodes[order], reply.clients)]
        after = models.index_copy(0, at.to(models.device), self.method.step({"x": models[at]}, reply, self.round)["x"])
        told = after
        if self.adversaries is not None:
            told = self.adversaries.models(models, after, nodes, rounds, self.problem.shared_layout)
        batches = [batch for lane in lanes for batch in lane.batches]
        kept = {n: torch.cat([batch.kept[n] for batch in batches]) for n in batches[0].kept}
        place = torch.empty_like(at).index_copy_(0, at, everyone)  # of each node among those that reply
        return [
            Outcome(
                after[i],
                None if told is after or bool(self.honest[nodes[i]]) else told[i] - after[i],
                {n: rows[place[i]] for n, rows in kept.items()},
                float(reply.loss[place[i]]),
                float(reply.weight[place[i]]),
            )
            for i in range(len(nodes))
        ]

    def _finished(self, node: int, outcome: Outcome) -> None:
        """A node has the result of its work: now it writes down what it keeps, and is in the round's record."""
        who = torch.tensor([node])
        if outcome.kept:
            self.kept.write(who, {n: row[None] for n, row in outcome.kept.items()})
        self.cohort = torch.cat([self.cohort, who])
        self._losses.append((outcome.loss, outcome.weight))
        weight = sum(w for _, w in self._losses)
        self.loss = sum(loss * w for loss, w in self._losses) / weight if weight else math.nan
        self.updates += 1
        self.taken[node] += 1

    def _played(self, x: Tensor) -> bool:
        """End a round with ``x``; whether there are more."""
        self._commit({"x": x}, {})
        self._losses = []
        return self.going()

    def _starts(self, jobs: Jobs) -> dict[int, Tensors]:
        """The messages that ``jobs`` started from, by version."""
        pairs = zip(jobs["version"].tolist(), jobs["message"].tolist(), strict=True)
        return {version: self.pending.messages[number].tensors for version, number in pairs}

    async def commit(self, state: State, notes: Tensors | None = None) -> None:
        self._commit(state, notes)

    def _commit(self, state: State, notes: Tensors | None) -> None:
        self.round, self.state, self.notes, self._draws = self.round + 1, state, notes or {}, 0
        self.pending.forget(self.clock)
        self._mark()
        self.on_commit(self)

    def _mark(self) -> None:
        self._committed, self._sent = (self.clock.mark(), self.pending.mark()), list[tuple[np.ndarray, np.ndarray]]()
        self._bound = 0.0 if self.privacy is None else self.privacy.bound
        self._traffic = None if self.traffic is None else self.traffic.clone()

    def take_back(self) -> bool:
        """Undo a round that failed, so that a snapshot is that of the last commit; False where it has collected replies before."""
        clock, mark = self._committed
        self.clock.take_back(clock)
        if self.privacy is not None:
            self.privacy.bound = self._bound
        for who, keys in reversed(self._sent):
            self.keys[who] = keys
        if self._traffic is not None:
            self.exchanges.traffic = self._traffic
        self.pending.take_back(mark, self.clock)
        return self.pending.covers(self.clock)

    # ---- execution

    def _execute_unless_known(self, column: np.ndarray, values: np.ndarray) -> None:
        """Execute what is due if any of the replies whose ``column`` is among ``values`` has not been executed yet."""
        if bool((self.arrived["known"][among(column, values)] == 0).any()):
            self._execute_all()

    def _execute_all(self) -> None:
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
        return self._perform(Orders(messages[0].work, tensors, tickets, clients, keys, versions, steps, place, share), total)

    def _perform(self, orders: Orders, total: bool) -> list[Lane]:
        if self.arrangement is None:
            self.arrangement = fastest(self, replace(orders, work="train"))  # an opening is over at once
            self.engine = type(self.engine)(**{**dict(self.engine), **self.arrangement._asdict()})
        lanes = self.crew.run(orders, self.arrangement, total)
        batches = [batch for lane in lanes for batch in lane.batches]
        loss = side_by_side([b.upload.loss for b in batches], self.problem.start)
        if not math.isfinite(float(loss.double().sum())):
            who = side_by_side([b.upload.clients for b in batches], orders.clients)
            bad = int(who[~torch.isfinite(loss.cpu())][0])
            raise DivergedError(
                f"training loss of client {bad} in round {self.round + 1} is not finite; lower lr ({self.method.lr}) or set clip"
            )
        return lanes

    def _reply(
        self,
        starts: dict[int, Tensors],
        found: Collected,
        total: float | None,
        aggregate: Callable[[Tensor, Tensor], Tensor] | None = None,
        trained: bool = True,
    ) -> Reply:
        """What the server sees of collected jobs, whose contributions become one by ``aggregate``, or as the rule says.

        If they ``trained``, they are in the round's record.
        """
        aggregate = self.method.aggregate if aggregate is None and self.method.robust else aggregate
        about = {
            "starts": starts,
            "total": total,
            "population": self.clients,
            "everyone": self.total_weight,
            "problem": self.problem,
        }
        reply = self._private(found.reply(self.problem.start[:0], aggregate, **about))
        if trained and len(reply):
            self.cohort = torch.cat([self.cohort, reply.clients]) if len(self.cohort) else reply.clients
            loss, weight = reply.loss.cpu().double().numpy(), reply.weight.cpu().double().numpy()
            total_weight = float(weight.sum())
            self.loss = float(loss @ weight) / total_weight if total_weight else math.nan
            self.staleness = self.round - int(reply.versions.sum()) / len(reply)
            self.updates += len(reply)
            self.taken.index_add_(0, reply.clients, torch.ones_like(reply.clients, dtype=self.taken.dtype))
        return reply

    def _enough(self, came: Tensor) -> None:
        if self.privacy is not None:
            self.privacy.enough(came, self.round)

    def _private(self, reply: Reply) -> Reply:
        return reply if self.privacy is None else self.privacy.reply(reply, self.round)

    @property
    def epsilon(self) -> float | None:
        """What the rounds so far have cost in privacy; None without ``differential``."""
        return None if self.privacy is None else self.privacy.epsilon(self.round)

    # ---- saving

    def snapshot(self) -> Tensors:
        """Everything from which ``restore`` goes on identically, as named tensors."""
        return {
            **nested(self._parts()),
            "format": torch.tensor([FORMAT]),
            "taken": self.taken.clone(),
            "keys": torch.from_numpy(self.keys.copy()),
            "loss": torch.tensor([self.loss], dtype=torch.float64),  # of the last round with anyone in it
            "counters": torch.tensor([self.round, self.updates]),
        }

    def _parts(self) -> dict[str, Tensors]:
        snapshots = {"kept": self.kept.snapshot(), "clock": self.clock.snapshot(), "pending": self.pending.snapshot()}
        private = {} if self.privacy is None else {"privacy": self.privacy.snapshot()}
        traffic = {} if self.traffic is None else {"bytes": self.traffic.clone()}
        return {"state": self.state, "notes": self.notes, "traffic": traffic, **snapshots, **private}

    def restore(self, saved: Tensors) -> None:
        """Go on from a snapshot; raises ``CheckpointError`` if it is not one of this run."""
        version = int(saved["format"][0]) if "format" in saved and saved["format"].numel() == 1 else None
        if version not in (None, FORMAT):
            raise CheckpointError(f"the checkpoint has format {version}; this version of hanse reads format {FORMAT}")
        groups = grouped(saved)
        part = {p: groups.get(p, {}) for p in self._parts()}
        own = {n: t for n, t in self.snapshot().items() if n in ("format", "taken", "keys", "loss", "counters")}
        x = part["state"].get("x")
        if x is None or x.shape[-1:] != (self.problem.shared,) or not alike(own, {n: saved[n] for n in own if n in saved}):
            raise CheckpointError("the checkpoint does not belong to this run: another model, or another number of clients")
        self.state, self.notes = {n: t.to(self.problem.device) for n, t in part["state"].items()}, part["notes"]
        if self.privacy is not None:
            self.privacy.restore(part["privacy"])
        self.kept.restore(part["kept"])
        self.clock.restore(part["clock"])
        self.pending.restore(part["pending"], self.clock, self.problem.device)
        if part["traffic"]:
            self.exchanges.traffic = part["traffic"]["bytes"].clone()
        self.taken, self.keys = saved["taken"].clone(), saved["keys"].numpy().copy()
        self.round, self.updates = map(int, saved["counters"])
        self.loss = float(saved["loss"])
        self._mark()
