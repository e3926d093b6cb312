"""A federation of real clients: letters to them, replies from them, in real time.

Who they are and how letters get there is a ``Post``'s affair. Replies are added up in the order of the clients, not in that in
which they come, so a run whose rounds wait for everybody repeats bit for bit, and equals a simulation of clients one at a time.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hanse.codecs.base import Codec
from hanse.core.errors import CheckpointError, CodecError, ConfigError, StalledError
from hanse.core.gradients import paths
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.samples import Samples
from hanse.core.state import ClientState
from hanse.core.streams import Streams
from hanse.data import Split
from hanse.engines.base import Arrangement, Engine
from hanse.engines.downlink import coded
from hanse.engines.execution import Batch, Executor, Lane, Orders, add
from hanse.engines.letters import Expected, as_bytes, expectations, upload_in
from hanse.engines.participant import NOTHING
from hanse.engines.pending import Collected, Result
from hanse.engines.rounds import Doing, Rounds, Standing
from hanse.engines.simulation import client_state
from hanse.federation import Federation
from hanse.fleet.clock import NEVER, SECOND, Clock, Events, Jobs, among
from hanse.fleet.profiles import ideal
from hanse.methods.base import Method

log = logging.getLogger(__name__)


class Returned(NamedTuple):
    """What came back of a letter: its number, and the reply, or why there is none."""

    letter: int
    client: int
    data: bytes | None
    why: str = ""


class Post(Protocol):
    """The way to the clients of one run."""

    largest: int
    """Bytes of the largest reply that can be right; of a larger one it is enough to say so."""

    def send(self, letter: int, client: int, data: bytes, about: Mapping[str, Any]) -> None:
        """Have a letter delivered, whenever the client can be reached."""
        ...

    def collect(self, seconds: float) -> list[Returned]:
        """What has come back; waits up to so many ``seconds`` for the first."""
        ...

    def reached(self) -> set[int]:
        """The clients that can be reached at the moment."""
        ...


class WallClock(Clock):
    """Jobs in real time: when a reply arrives is known when it does."""

    def __init__(self, clients: Federation, streams: Streams) -> None:
        super().__init__(ideal(), clients.population, streams)
        self._began = time.monotonic()

    def tick(self) -> None:
        """What time it is."""
        self.time = max(self.time, int((time.monotonic() - self._began) * SECOND))

    def go_on_from(self, moment: int) -> None:
        """Continue a run that had got to that time."""
        self._began = time.monotonic() - moment / SECOND

    def send(self, *args: Any, **kwargs: Any) -> Jobs:
        self.tick()
        jobs = super().send(*args, **kwargs)
        mine = among(self.out["ticket"], jobs["ticket"])
        for table in (jobs, self.out):
            rows = slice(None) if table is jobs else mine
            for name in ("received", "computed", "arrives"):
                table[name][rows] = NEVER
        return jobs

    def came(self, ticket: int, size: int) -> None:
        """The reply of a job is there."""
        row = np.flatnonzero(self.out["ticket"] == ticket)
        for name in ("computed", "arrives"):
            self.out[name][row] = self.time
        self.out["up"][row], self.out["known"][row] = size, 1

    def give_up(self, tickets: np.ndarray) -> None:
        """Nobody waits for these jobs any more."""
        self.out["expires"][among(self.out["ticket"], tickets)] = self.time

    @property
    def still(self) -> bool:
        return False


class Deployment(Rounds):
    """The network of a run with real clients, whose numbers of samples are ``counts`` int64 ``[N]``, and who are called ``names``.

    A client that cannot be reached for ``grace`` seconds is given up for the round, one that works is not.
    """

    def __init__(
        self,
        federation: Federation,
        method: Method,
        engine: Engine,
        codec: Codec,
        down: Codec,
        post: Post,
        counts: Tensor,
        *,
        run: str,
        grace: float,
        names: Sequence[str] = (),
        seed: int,
        rounds: int,
        seconds: float = math.inf,
        on_commit: Callable[[Any], None] = lambda net: None,
    ) -> None:
        if method.masks or method.own_model is not None:
            why = "it asks which entries were sent" if method.masks else "the server would have to know every client's own model"
            raise ConfigError(f"method: {method} is not allowed with real clients: {why}")
        if federation.buffers == "domain":
            raise ConfigError("buffers: 'domain' is not allowed with real clients: a reply would have to name its domain")
        streams = federation.streams if seed == federation.seed else Streams(seed)
        split = federation.split
        if not len(split.test_x):
            raise ConfigError("task: no test samples: the server tells from one of its own what replies have to look like")
        federation = federation.bare()
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        empty = Samples(split.train.x[:0], split.train.y[:0], offsets)
        federation.split = replace(split, train=empty, test=replace(empty, offsets=offsets * 0), newcomers=None)
        clock = WallClock(federation, streams)
        self.based = np.full(federation.clients, NOTHING, dtype=np.int64)
        """The work after which each client's state is what it goes on from."""
        kept = ClientState(federation.clients, {}, federation.problem.dtype)
        super().__init__(
            federation, method, engine, codec, down, clock, kept, seed=seed, rounds=rounds, seconds=seconds, on_commit=on_commit
        )
        self.clock: WallClock = clock
        self.post, self.run, self.grace = post, run, grace
        now = time.time()
        self.standing = [Standing(name, "ready", now, "") for name in names or map(str, range(self.clients))]
        self.safe = self.based.copy()
        self.refused = self.failed = 0
        self._letters: dict[int, int] = {}
        """Whose letters nobody has answered yet, also of jobs that are given up: who is still at one gets no other."""
        self._failures, self._pause = np.zeros(self.clients, dtype=np.int64), np.zeros(self.clients, dtype=np.int64)
        self._saved = self.based.copy()
        self._looked, self._missed = 0.0, np.full(self.clients, NEVER)
        self.expected = expected_of(self, split)
        numbers = max(sum(math.prod(e.shape) for e in expected.values()) for expected, _ in self.expected.values())
        post.largest = 16 * numbers  # with the place of each, as a sparse one has it

    # ---- what a schedule sees

    def there(self, clients: Tensor) -> Tensor:
        self._look(force=True)
        return torch.from_numpy(~self._absent()[clients.numpy()])

    def _absent(self) -> np.ndarray:
        """Who cannot be asked: out of reach, at a letter that was given up, or in a pause after work that failed, bool ``[N]``."""
        absent: np.ndarray = (self._missed < NEVER) | (self._pause > self.clock.time)
        behind = set(self._letters.values()) - set(self.out["client"].tolist())
        absent[[*behind]] = True
        return absent

    def _send(
        self, clients: Tensor, work: str, message: Tensors, steps: Tensor | None, patience: float, parts: Tensor | None
    ) -> Jobs:
        who = clients.numpy()
        self._remember(self.arrived[among(self.arrived["client"], who)])
        jobs = super()._send(clients, work, message, steps, patience, parts)
        letters = self.downlink.letters(message, clients, parts, self.round)
        written: dict[int, bytes] = {}  # mostly one for all
        for job, letter in zip(jobs, letters, strict=True):
            if id(letter) not in written:
                written[id(letter)] = as_bytes(letter)
            self._post(job, work, written[id(letter)], message)
        return jobs

    def _post(self, job: Any, work: str, data: bytes, message: Tensors) -> None:
        client = int(job["client"])
        about = {
            "run": self.run,
            "work": work,
            "key": int(job["key"]),
            "version": int(job["version"]),
            "steps": int(job["steps"]),
            "share": float(job["share"]) or None,
            "base": int(self.based[client]),
            "safe": int(self.safe[client]),
            "coded": {} if self.down.plain else {n: len(vector) for n, vector in coded(message)},
        }
        self._letters[int(job["ticket"])] = client
        self.post.send(int(job["ticket"]), client, data, about)
        self._turn(client, "work", f"{work} for round {self.round + 1}")

    async def wait(self, replies: int = 1, until: float = math.inf, anyone: bool = False) -> Events:
        arrived, before = self.arrived[:0], self._absent()
        self.on_phase("waiting")
        while True:
            for returned in self.post.collect(max(0.0, min(0.5, until - self.now))):
                self._take_in(returned)
            self._look()
            self.clock.tick()
            events = self.clock.happened(until)
            arrived = np.concatenate([arrived, events.arrived])
            back = anyone and bool((before & ~self._absent()).any())
            left = len(self.out) or len(self.clock.rests) or anyone
            nothing = not left and (math.isinf(until) or len(arrived) > 0)
            if len(arrived) >= replies or len(events.lost) or len(events.rested) or events.due or back or nothing:
                self.on_phase("stepping")
                return events._replace(arrived=arrived)

    async def ask(self, clients: Tensor, work: str, message: Tensors, parts: Tensor | None = None) -> Reply:
        jobs = self._send(clients, work, message, None, math.inf, parts)
        lines = self._lines(jobs)
        lanes = [Lane() for _ in lines]
        while bool(among(self.out["ticket"], jobs["ticket"]).any()):
            await self.wait()
            self._add_up(lines, lanes)
        self._add_up(lines, lanes)
        arrived = self.arrived[among(self.arrived["ticket"], jobs["ticket"])]
        self._remember(arrived)
        starts = self._starts(self.clock.take(arrived["ticket"]))
        return self._reply(starts, Collected([lane for lane in lanes if lane.batches], [], None), None)

    def _lines(self, jobs: Jobs) -> list[list[int]]:
        """In which order the replies of ``jobs`` are added up, lane by lane: that in which a simulation does it."""
        order = np.lexsort((jobs["client"], -jobs["steps"], jobs["client"] % self.engine.shards))
        shards = jobs["client"][order] % self.engine.shards
        return [jobs["ticket"][order][shards == shard].tolist() for shard in range(self.engine.shards)]

    def _add_up(self, lines: list[list[int]], lanes: list[Lane]) -> None:
        """Add what has come to the sums of its lane as soon as everything before it has; single contributions are not kept."""
        results = {int(result.batch.tickets): result for result in self.pending.results}
        for line, lane in zip(lines, lanes, strict=True):
            while line and line[0] not in self.out["ticket"]:
                result = results.pop(line.pop(0), None)
                if result is None:
                    continue
                upload = result.batch.upload
                for name, values in upload.sums.items():
                    add(lane.sums, name, upload.weight, values)
                if not self.method.robust:
                    upload.sums = {}
                lane.batches.append(result.batch)
        self.pending.results = [*results.values()]

    def collect(self, jobs: Jobs, scale: Tensor | None = None, total: float | None = None) -> Reply:
        self._remember(jobs)
        place = {ticket: i for i, ticket in enumerate(chain(*self._lines(jobs)))}
        self.pending.results.sort(key=lambda result: place.get(int(result.batch.tickets), -1))
        return super().collect(jobs, scale, total)

    def _remember(self, jobs: Jobs) -> None:
        """What these clients have kept of these jobs is what they go on from."""
        self.based[jobs["client"]] = np.maximum(self.based[jobs["client"]], jobs["key"])

    # ---- what comes back

    def _take_in(self, returned: Returned) -> None:
        """A reply: kept until it is collected, or refused."""
        self.clock.tick()
        whose = self._letters.get(returned.letter)
        if whose != returned.client:
            self._refuse(returned.client, f"nothing is expected from it under number {returned.letter}")
            return
        del self._letters[returned.letter]
        row = self.clock.out[(self.clock.out["ticket"] == returned.letter) & (self.clock.out["known"] == 0)]
        if not len(row):
            self.clock.late += 1
            return
        upload = self._read(returned, self.pending.messages[int(row["message"][0])].work)
        if upload is None:
            self._failures[returned.client] += 1
            pause = min(60.0, 0.5 * 2.0 ** int(self._failures[returned.client]))  # or it would be asked again at once, for ever
            self._pause[returned.client] = self.clock.time + int(pause * SECOND)
            self.clock.give_up(row["ticket"])
            return
        self._failures[returned.client] = 0
        tickets, versions = (torch.from_numpy(row[n].copy()) for n in ("ticket", "version"))
        size = len(returned.data or b"")
        batch = Batch(tickets, versions, upload, torch.tensor([size]), {}, torch.ones(1, dtype=torch.bool))
        self.pending.results.append(Result(returned.client % self.engine.shards, batch))
        self.clock.came(returned.letter, size)
        self._turn(returned.client, "ready", f"replied in round {self.round + 1}")

    def _read(self, returned: Returned, work: str) -> Upload | None:
        """The upload in a reply, or None where there is none, or none to be used."""
        layouts, like = self.problem.layout_of, self.problem.start
        if returned.data is None:
            self.failed += 1
            self._turn(returned.client, "failed", returned.why)
            said = "client %d did not do its work of round %d: %s"
            about = {"client": returned.client, "round": self.round + 1}
            log.warning(said, returned.client, self.round + 1, in_one_line(returned.why), extra=about)
            return None
        try:
            expected, weighs = self.expected[work]
            upload = upload_in(returned.data, returned.client, expected, like, self.codec, layouts)
            fair = float(self.method.weight(self.counts[returned.client].to(like)))
            if weighs and not math.isclose(float(upload.weight), fair, rel_tol=1e-6):
                raise CodecError(f"weight: {float(upload.weight)} instead of {fair}")
            return upload
        except CodecError as error:
            self._refuse(returned.client, str(error))
            return None

    def _refuse(self, client: int, why: str) -> None:
        self.refused += 1
        self._turn(client, "refused", why)
        about = {"client": client, "round": self.round + 1}
        log.warning("client %d is refused in round %d: %s", client, self.round + 1, in_one_line(why), extra=about)

    def _look(self, force: bool = False) -> None:
        """Who can be reached; jobs of those who cannot for long are given up."""
        if not force and time.monotonic() - self._looked < 1.0:
            return
        self._looked = time.monotonic()
        self.clock.tick()
        reached = self.post.reached()
        for client in range(self.clients):
            if client in reached and self._missed[client] < NEVER:
                self._missed[client] = NEVER
                self._turn(client, "work" if client in self.out["client"] else "ready", "it is back")
            elif client not in reached and self._missed[client] == NEVER:
                self._missed[client] = self.clock.time
                self._turn(client, "away", "it cannot be reached")
        gone = self._missed[self.out["client"]] < self.clock.time - self.grace * SECOND
        for job in self.out[gone]:
            about = {"client": int(job["client"]), "round": self.round + 1}
            said = "client %d cannot be reached for %g s; round %d goes on"
            log.warning(said, job["client"], self.grace, self.round + 1, extra=about)
        self.clock.give_up(self.out["ticket"][gone])
        if not reached and bool((self._missed < self.clock.time - 10 * self.grace * SECOND).all()):
            raise StalledError(f"no client can be reached for {10 * self.grace:g} seconds")

    # ---- saving

    def _mark(self) -> None:
        super()._mark()
        self._based = self.based.copy()

    def take_back(self) -> bool:
        self.based = self._based.copy()
        return super().take_back()

    def snapshot(self) -> Tensors:
        saved = super().snapshot()
        self.safe, self._saved = self._saved, self.based.copy()  # this one may still get lost, as on a full disk
        return {**saved, "based": torch.from_numpy(self.based.copy()), "counts": self.counts.clone()}

    def restore(self, saved: Tensors) -> None:
        if "based" not in saved or saved["based"].shape != self.based.shape:
            raise CheckpointError("the checkpoint does not belong to this run: its clients were simulated")
        self.based = saved["based"].numpy().copy()
        self._saved = self.based.copy()
        super().restore(saved)
        self.clock.go_on_from(self.clock.time)
        for job in self.clock.out:  # nobody may have them any more, and who has done them already does the same again
            message = self.pending.messages[int(job["message"])]
            self._post(job, message.work, as_bytes(message.tensors), {})

    def _turn(self, client: int, state: Doing, why: str) -> None:
        """What a client does from now on."""
        self.standing[client] = Standing(self.standing[client].name, state, time.time(), in_one_line(why))

    def report(self) -> list[Standing]:
        """See ``Rounds``."""
        return [*self.standing]

    def failures(self) -> dict[str, int]:
        """See ``Rounds``; and work that ``failed`` there, and replies that were ``refused``, whose jobs are among those lost."""
        return {**super().failures(), "failed": self.failed, "refused": self.refused}


def in_one_line(why: str) -> str:
    """What a client says went wrong, as far as a log can bear it."""
    return " ".join(why.split())[:300]


def expected_of(net: Deployment, split: Split) -> dict[str, tuple[dict[str, Expected], bool]]:
    """What replies to each kind of work look like, and whether clients weigh what the rule says for their number of samples: as in
    one step on a test sample of the server's own.
    """
    problem, method, zero = net.problem, net.method, torch.zeros(1, dtype=torch.long)
    one = Samples(split.test_x[:1], split.test_y[:1], torch.tensor([0, 1]))
    ways, kept = paths(problem, False), client_state(net.federation, method, None)
    executor = Executor(problem, one, one, method, net.codec, net.streams, kept, ways, shortcuts=False)
    message, how = method.message(method.init(problem)), Arrangement(next(iter(ways)), 1, 1, torch.get_num_threads())
    works = ("open", "train") if method.opens else ("train",)
    orders = {work: Orders(work, [message], zero, zero, zero, zero, zero + 1, zero) for work in works}
    uploads = {work: executor.train(order, how).upload for work, order in orders.items()}
    fair = float(method.weight(torch.ones(1, dtype=problem.dtype)))
    return {work: (expectations(upload), float(upload.weight) == fair) for work, upload in uploads.items()}
