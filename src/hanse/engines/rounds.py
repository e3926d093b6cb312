"""The server's side of one run, wherever its clients are."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hanse.codecs.base import Codec, Links
from hanse.core.dropout import unkeyed
from hanse.core.errors import CheckpointError, ConfigError
from hanse.core.messages import Reply, Tensors
from hanse.core.state import ClientState
from hanse.core.wire import grouped, nested
from hanse.engines.adversaries import Adversaries
from hanse.engines.base import Engine
from hanse.engines.downlink import Downlink
from hanse.engines.execution import Lane, keep_freed_memory
from hanse.engines.mechanisms import Mechanisms
from hanse.engines.pending import Collected, Pending
from hanse.federation import Federation
from hanse.fleet.clock import Clock, Events, Jobs, among
from hanse.fleet.profiles import Work
from hanse.methods.base import Method, State
from hanse.topologies import Mixing

SHARE_BYTES = 8
"""What a message is longer by that says what part of its entries a client may send."""

FORMAT = 5
"""Version of a checkpoint's layout; one that reads differently counts up."""


Doing = Literal["ready", "work", "away", "failed", "refused"]


class Standing(NamedTuple):
    """What a client is doing, since when (seconds since 1970), and why: ``ready``, at ``work``, ``away``; or its last work
    ``failed`` there, or its last reply was ``refused`` here.
    """

    name: str
    state: Doing
    since: float
    why: str


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


class Rounds:
    """The network of one run as far as it is the same wherever clients are: rounds, messages, work under way, books, snapshots.

    ``clock`` has the jobs that are out; what a reply needs has been ``pending`` since it came. ``kept`` is what clients keep, where
    the server's machine knows it. ``on_commit(network)`` is called after every round; setting ``stopping`` ends the run after the
    current one. ``seconds``: end it when time is that far.
    """

    privacy: Mechanisms | None = None
    adversaries: Adversaries | None = None
    mixing: Mixing | None = None
    """The weights of the first exchange between peers."""

    def __init__(
        self,
        federation: Federation,
        method: Method,
        engine: Engine,
        codec: Codec,
        down: Codec,
        clock: Clock,
        kept: ClientState,
        *,
        seed: int,
        rounds: int,
        seconds: float,
        on_commit: Callable[[Any], None],
    ) -> None:
        keep_freed_memory()
        if down != method.down and (down.keeps or down.sparse):
            raise ConfigError(f"down: {down} is not allowed: it carries the model itself, so every number has to be sent")
        self.federation, self.method, self.engine, self.clock, self.kept = federation, method, engine, clock, kept
        self.codec, self.down = ruled(method.codec, codec, "codec", method), ruled(method.down, down, "down", method)
        self.problem, self.samples, self.clients = federation.problem, federation.split.train, federation.clients
        self.streams = clock.streams
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
        self.downlink = Downlink(self.down, self.problem.layout_of, self.streams)
        self.pending = Pending()
        self.flops = 0.0 if clock.timeless else self.problem.sample_flops(self.samples.x[:1]) * method.gradients
        self.footprint = self._footprint()
        self.state: State = {}
        self.notes: Tensors = {}
        self.letters: dict[str, list[int]] = {}
        """Messages and bytes by kind that peers' programs have sent so far."""
        self.stopping = False
        self.on_phase: Callable[[str], None] = lambda phase: None
        """Is told when the network begins to be ``waiting`` for clients, and when it is ``stepping``, by itself, again."""
        self._draws = 0
        self._mark()

    def close(self) -> None:
        """No more work will come."""

    def report(self) -> list[Standing]:
        """What every client is doing; empty where they are simulated."""
        return []

    def failures(self) -> dict[str, int]:
        """What has gone wrong so far, by kind: jobs ``lost``, and replies that came too ``late``."""
        return {"lost": self.clock.lost, "late": self.clock.late}

    @property
    def personal(self) -> bool:
        """Whether clients' models differ in private parameters or statistics."""
        problem = self.problem
        own_buffers = bool(problem.buffer_layout.size) and not problem.shares_buffers
        return problem.layout.size > problem.shared or own_buffers or problem.shared_buffers.dim() > 1

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
        """See ``Network``."""
        raise TypeError(f"{type(self).__name__} does not define there")

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
        sooner = min(until, self.back()) if anyone else until
        events = self.clock.advance(replies, sooner, self.execute_all)
        return events if sooner == until else events._replace(due=False)

    def back(self) -> float:
        """When the next client that is away comes back, as far as that is known."""
        return math.inf

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

    def _keep(self, lanes: list[Lane]) -> None:
        for batch in (batch for lane in lanes for batch in lane.batches if batch.kept):
            self.kept.write(batch.upload.clients, batch.kept)

    async def ask(self, clients: Tensor, work: str, message: Tensors, parts: Tensor | None = None) -> Reply:
        """See ``Network``."""
        raise TypeError(f"{type(self).__name__} does not define ask")

    # ---- among peers, where there are some

    def starts(self) -> Tensor:
        raise self._no_peers()

    async def work(self, nodes: Tensor, work: str, message: Tensors, patience: float = math.inf) -> Reply:
        raise self._no_peers()

    async def exchange(self, models: Tensor, mixing: Mixing, before: Tensor | None) -> tuple[Tensor, Mixing]:
        raise self._no_peers()

    async def play(self, program: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        raise self._no_peers()

    def _no_peers(self) -> ConfigError:
        return ConfigError(f"engine: {self.engine.short_name} is not allowed without a server: its clients do not know each other")

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
            self.set_traffic(self._traffic)
        self.pending.take_back(mark, self.clock)
        return self.pending.covers(self.clock)

    @property
    def traffic(self) -> Tensor | None:
        """What each node has sent and received, bytes, int64 ``[N, 2]``; None with a server, to and from whom everything goes."""
        return None

    def set_traffic(self, traffic: Tensor) -> None:
        """Have what nodes have sent and received be this."""
        raise CheckpointError("the checkpoint does not belong to this run: one has a server, the other has none")

    # ---- replies
    def _execute_unless_known(self, column: np.ndarray, values: np.ndarray) -> None:
        """Execute what is due if any of the replies whose ``column`` is among ``values`` has not been executed yet."""
        if bool((self.arrived["known"][among(column, values)] == 0).any()):
            self.execute_all()

    def execute_all(self) -> None:
        """Have everything executed that has come or will come; where replies really come, they have been."""

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
            self.set_traffic(part["traffic"]["bytes"].clone())
        self.taken, self.keys = saved["taken"].clone(), saved["keys"].numpy().copy()
        self.round, self.updates = map(int, saved["counters"])
        self.loss = float(saved["loss"])
        self._mark()
