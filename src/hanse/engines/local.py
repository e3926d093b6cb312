"""Everything in this process: clients run in batches, in virtual time."""

from __future__ import annotations

import ctypes
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from hanse.codecs.base import Codec
from hanse.core.context import Context
from hanse.core.dropout import unkeyed
from hanse.core.errors import CheckpointError, ConfigError, DivergedError
from hanse.core.gradients import GradientPath, paths
from hanse.core.messages import Reply, Tensors, Upload, wire_size
from hanse.core.state import ClientState
from hanse.engines.arrangement import Arrangement, fastest
from hanse.engines.base import Engine
from hanse.federation import Federation
from hanse.methods.base import Method, State


class local(Engine):
    """This process. What is left open is chosen by timing each way once on the first cohort and remembered for this machine."""

    path: Literal["stacked", "vmap", "loop"] | None = None
    """How gradients are computed: batched matrix products, torch.vmap, or one client at a time."""
    chunk: PositiveInt | None = None
    """Clients per batch."""
    workers: PositiveInt | None = None
    """Batches at a time, each in a thread of its own."""
    threads: PositiveInt | None = None
    """Threads inside one operation."""
    precision: Literal["full", "bf16"] = "full"
    """bf16: forward and backward in bfloat16, weights and updates in full precision."""
    kept: Literal["memory", "disk"] = "memory"
    """Where what clients remember between rounds lives: in memory, or in memory-mapped temporary files."""
    shortcuts: bool = True
    """Use exact algebraic shortcuts for plain SGD; they sum in another order, so the last bits differ."""

    def fixed(self) -> Arrangement | None:
        """The arrangement, if nothing is left open."""
        if self.path and self.chunk and self.workers and self.threads:
            return Arrangement(self.path, self.chunk, self.workers, self.threads)
        return None


AS_IS = {"buffers", "domain"}
"""What no codec touches: batch-norm statistics (a variance sparsified to zero breaks the model), and whose they are."""


FORMAT = 1
"""Version of a checkpoint's layout; one that reads differently counts up."""


class Traffic(NamedTuple):
    """Cumulative costs of a run."""

    seconds: float
    down: int
    up: int


class Executed(NamedTuple):
    """The reply of some clients, the bytes each sent, and the rows they want to keep."""

    reply: Reply
    bytes_up: Tensor
    kept: list[tuple[Tensor, Tensors]]


@dataclass
class Lane:
    """What one worker has done so far: running sums, and its batches' uploads, bytes and rows to keep."""

    sums: Tensors = field(default_factory=dict)
    uploads: list[Upload] = field(default_factory=list)
    bytes_up: list[Tensor] = field(default_factory=list)
    kept: list[tuple[Tensor, Tensors]] = field(default_factory=list)


def alike(one: Tensors, other: Tensors) -> bool:
    """Whether names, shapes and types agree."""
    return {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}


@cache
def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next round.

    By default it returns each to the system at once, which then clears and maps every page again: for vectors of megabytes that
    takes longer than the arithmetic on them.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            trim_threshold, mmap_max = -1, -4
            libc.mallopt(trim_threshold, 1 << 30)
            libc.mallopt(mmap_max, 0)


class LocalNetwork:
    """The network of one run: it executes work in batches and keeps virtual time, traffic and what clients remember.

    ``on_commit(network)`` is called after every round; setting ``stopping`` ends the run after the current one.
    """

    def __init__(
        self,
        federation: Federation,
        method: Method,
        engine: local,
        codec: Codec,
        *,
        seed: int,
        rounds: int,
        on_commit: Callable[[LocalNetwork], None],
    ) -> None:
        keep_freed_memory()
        self.federation, self.method, self.engine, self.codec = federation, method, engine, codec
        self.problem, self.samples, self.clients = federation.problem, federation.split.train, federation.clients
        self.streams = federation.streams if seed == federation.seed else type(federation.streams)(seed)
        loose = unkeyed(self.problem.model) if method.batched else []
        if loose:
            raise ConfigError(
                f"dropout of {', '.join(loose)} is not allowed: it draws from a global generator, so runs would not repeat; "
                "set it to 0, or train by a OneByOne rule"
            )
        self.plan = method.plan()
        self.round, self.total_rounds, self.on_commit = 0, rounds, on_commit
        self.traffic = Traffic(0.0, 0, 0)
        self.taken = torch.zeros(self.clients, dtype=torch.int32)
        self.cohort, self.loss = torch.zeros(0, dtype=torch.long), math.nan
        self.arrangement = engine.fixed()
        self.paths: dict[str, GradientPath] = paths(self.problem, engine.precision == "bf16")
        if engine.path is not None and engine.path not in self.paths:
            raise ConfigError(f"local.path: {engine.path!r} is not allowed for this model: {', '.join(self.paths)}")
        widths = dict.fromkeys(method.keeps, self.problem.shared)
        initial = {}
        if self.problem.layout.size > self.problem.shared:
            widths["private"] = self.problem.layout.size - self.problem.shared
            initial["private"] = self.problem.start[self.problem.shared :]
        if self.problem.buffer_layout.size and not self.problem.shares_buffers:
            widths["buffers"], initial["buffers"] = self.problem.buffer_layout.size, self.problem.start_buffers
        self._files = tempfile.TemporaryDirectory(prefix="hanse-") if engine.kept == "disk" else None
        where = Path(self._files.name) if self._files else None
        self.kept = ClientState(self.clients, widths, self.problem.dtype, self.problem.device, initial, where)
        self.work = (
            self.problem.sample_flops(self.samples.x[:1])
            if federation.fleet.profile(federation.streams, torch.zeros(1).long())
            else 0.0
        )
        self.state: State = {}
        self.stopping = False
        self._pool: ThreadPoolExecutor | None = None

    @property
    def personal(self) -> bool:
        """Whether clients' models differ in private parameters or statistics."""
        shared = self.problem.shared_buffers
        return "private" in self.kept.widths or "buffers" in self.kept.widths or shared.dim() > 1

    # ---- what a schedule sees

    def begin(self, state: State) -> State:
        if not self.state:
            self.state = state
        elif not alike(state, self.state):
            raise CheckpointError("the checkpoint does not belong to this run: another rule, or another type of weights")
        return self.state  # a resumed run brought its own

    def rounds(self) -> Iterator[int]:
        while self.round < self.total_rounds and not self.stopping:
            self.cohort = self.cohort[:0]
            yield self.round

    def sample(self, k: int) -> Tensor:
        return self.streams.sample("cohort", self.clients, k, self.round)

    async def ask(self, clients: Tensor, work: str, message: Tensors) -> Reply:
        self.cohort = clients
        if self.arrangement is None:
            self.arrangement = fastest(self, clients, work, message)
            self.engine = local(**{**dict(self.engine), **self.arrangement._asdict()})
        reply, bytes_up, kept = self.execute(clients, work, message, self.arrangement)
        self.loss = float(reply.loss.double() @ reply.weight.double() / reply.weight.sum())
        if not math.isfinite(self.loss):
            bad = int(reply.clients[~torch.isfinite(reply.loss)][0])
            raise DivergedError(
                f"training loss of client {bad} in round {self.round + 1} is not finite; lower lr ({self.method.lr}) or set clip"
            )
        for ids, rows in kept:  # only now: a round that fails leaves what clients remember as it was
            self.kept.write(ids, rows)
        self._account(reply.clients, wire_size(message), bytes_up)
        return reply

    async def commit(self, state: State) -> None:
        self.round, self.state = self.round + 1, state
        self.on_commit(self)

    def snapshot(self) -> Tensors:
        """Everything from which ``restore`` goes on identically, as named tensors."""
        return {
            **{f"state.{n}": t for n, t in self.state.items()},
            **{f"kept.{n}": t for n, t in self.kept.snapshot().items()},
            "format": torch.tensor([FORMAT]),
            "taken": self.taken.clone(),
            "seconds": torch.tensor([self.traffic.seconds], dtype=torch.float64),
            "loss": torch.tensor([self.loss], dtype=torch.float64),  # of the last round with anyone in it
            "counters": torch.tensor([self.round, self.traffic.down, self.traffic.up]),
        }

    def restore(self, saved: Tensors) -> None:
        """Go on from a snapshot; raises ``CheckpointError`` if it is not one of this run."""
        version = int(saved["format"][0]) if "format" in saved and saved["format"].numel() == 1 else None
        if version not in (None, FORMAT):
            raise CheckpointError(f"the checkpoint has format {version}; this version of hanse reads format {FORMAT}")
        part = {p: {n[len(p) :]: t for n, t in saved.items() if n.startswith(p)} for p in ("state.", "kept.")}
        own = {n: t for n, t in self.snapshot().items() if n in ("format", "taken", "seconds", "loss", "counters")}
        x = part["state."].get("x")
        if x is None or x.shape != (self.problem.shared,) or not alike(own, {n: saved[n] for n in own if n in saved}):
            raise CheckpointError("the checkpoint does not belong to this run: another model, or another number of clients")
        self.state = {n: t.to(self.problem.device) for n, t in part["state."].items()}
        self.kept.restore(part["kept."])
        self.taken = saved["taken"].clone()
        self.round, down, up = map(int, saved["counters"])
        self.traffic, self.loss = Traffic(float(saved["seconds"]), down, up), float(saved["loss"])

    # ---- execution

    def execute(self, clients: Tensor, work: str, message: Tensors, how: Arrangement) -> Executed:
        """Run the clients' work as arranged. Nothing is remembered yet, so it may be repeated.

        Each worker takes every n-th batch and keeps its own sums, so the order of all additions is fixed.
        """
        steps = self.plan.lengths(self.samples.counts(clients)).numpy()
        if len(steps) and steps.min() < steps.max():
            clients = clients[torch.from_numpy((-steps).argsort(kind="stable"))]  # those still at work are always the first ones
        torch.set_num_threads(how.threads)
        batches = [clients[i : i + how.chunk] for i in range(0, len(clients), how.chunk)]
        workers = min(how.workers, len(batches))
        if workers == 1:
            lanes = [self._lane(batches, work, message, how)]
        else:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(how.workers, initializer=torch.set_num_threads, initargs=(how.threads,))
            shares = [batches[i::workers] for i in range(workers)]
            lanes = list(self._pool.map(lambda share: self._lane(share, work, message, how), shares))
        sums, uploads = lanes[0].sums, [upload for lane in lanes for upload in lane.uploads]
        for lane in lanes[1:]:
            for name, total in lane.sums.items():
                sums[name].add_(total)
        reply = Reply(
            clients=torch.cat([u.clients for u in uploads]),
            weight=torch.cat([u.weight for u in uploads]),
            sums=sums,
            rows={name: torch.cat([u.rows[name] for u in uploads]) for name in uploads[0].rows},
            loss=torch.cat([u.loss for u in uploads]),
            population=self.clients,
            version=self.round,
        )
        sizes = torch.cat([size for lane in lanes for size in lane.bytes_up])
        return Executed(reply, sizes, [pair for lane in lanes for pair in lane.kept])

    def _lane(self, batches: list[Tensor], work: str, message: Tensors, how: Arrangement) -> Lane:
        """One worker's batches of clients: train, encode, and add up what only sums are needed of."""
        lane, train = Lane(), getattr(self.method, work)
        for ids in batches:
            state = self.kept.read(ids) if self.kept.widths else {}
            ctx = Context(
                problem=self.problem,
                path=self.paths[how.path],
                samples=self.samples,
                streams=self.streams,
                round=self.round,
                ids=ids,
                message=message,
                state=state,
                plan=self.plan,
                lr=self.method.lr.at(self.round),
                local=self.method.local,
                clip=self.method.clip,
                totals=lane.sums if self.codec.plain and self.engine.shortcuts else None,
            )
            upload: Upload = train(ctx)
            lane.bytes_up.append(self._encode(upload))
            for name, values in upload.sums.items():
                if values.dim() > 1:
                    known = lane.sums.get(name)
                    lane.sums[name] = upload.weight @ values if known is None else known.addmv_(values.t(), upload.weight)
            upload.sums = {}  # rows of a finished batch need not stay in memory
            lane.uploads.append(upload)
            if state:
                lane.kept.append((ids, state))
        return lane

    def _encode(self, upload: Upload) -> Tensor:
        """Replace what is sent by what arrives through the codec; returns the bytes of every client's message, int64 ``[C]``."""
        scalars = {"weight": upload.weight[:1], "loss": upload.loss[:1]}
        scalars |= {n: t[0] for group in (upload.sums, upload.rows) for n, t in group.items() if n in AS_IS}
        if self.codec.plain:
            one = {n: t if t.dim() == 1 else t[0] for n, t in upload.sums.items()} | {n: t[0] for n, t in upload.rows.items()}
            return torch.full((len(upload.clients),), wire_size({**one, **scalars}))
        lengths: dict[str, Tensor] = {}
        for group in (upload.sums, upload.rows):
            for name in [n for n in group if n not in AS_IS]:
                group[name], lengths[name] = self.codec.roundtrip(group[name])
        kinds, of = np.unique(torch.stack([*lengths.values()], 1).numpy(), axis=0, return_inverse=True)
        sizes = [wire_size(scalars, dict(zip(lengths, map(int, kind), strict=True))) for kind in kinds]
        return torch.tensor(sizes)[torch.from_numpy(of).view(-1)]

    def _account(self, clients: Tensor, down: int, up: Tensor) -> None:
        seconds, profile = self.traffic.seconds, self.federation.fleet.profile(self.federation.streams, clients)
        if profile is not None:
            flops = self.work * self.plan.seen(self.samples.counts(clients))
            seconds += float(profile.seconds(flops, down, up).max())
        self.traffic = Traffic(seconds, self.traffic.down + down * len(clients), self.traffic.up + int(up.sum()))
        self.taken.numpy()[clients.numpy()] += 1
