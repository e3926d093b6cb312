"""Clients' work, executed in batches."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hanse.codecs.base import Codec, Sending
from hanse.core.context import Context
from hanse.core.gradients import GradientPath
from hanse.core.messages import Tensors, Upload
from hanse.core.problem import Problem
from hanse.core.samples import Samples
from hanse.core.state import ClientState
from hanse.core.streams import Streams
from hanse.core.wire import grouped, nested, wire_size
from hanse.engines.adversaries import Adversaries
from hanse.engines.base import Arrangement
from hanse.engines.mechanisms import Mechanisms
from hanse.methods.base import Method

S = TypeVar("S")
T = TypeVar("T")


def as_is(name: str, dtype: torch.dtype) -> bool:
    """Whether no codec touches it: batch-norm statistics (a variance sparsified to zero breaks the model), and what is a name or a
    number of something, which is of an integer type.
    """
    return name == "buffers" or not dtype.is_floating_point


@dataclass(frozen=True)
class Orders:
    """What some clients are to do, each tensor int64 ``[C]``: all of the rule's ``work``, from ``messages[which]``, or where
    every client works on a model of its ``own`` and sends nothing, from row ``which`` of the only message.

    ``tickets`` are the numbers of the jobs, ``rounds`` names each client's work (all its chance is drawn for it), ``versions`` is
    the round of its message, ``steps`` its number of local steps. ``share`` float64 ``[C]`` is what part of its entries each may
    send, where the server has allotted that.
    """

    work: str
    messages: Sequence[Tensors]
    tickets: Tensor
    clients: Tensor
    rounds: Tensor
    versions: Tensor
    steps: Tensor
    which: Tensor
    share: Tensor | None = None
    own: bool = False

    def __len__(self) -> int:
        return len(self.clients)

    def columns(self) -> Tensors:
        """What there is of every client, by name."""
        names = ("tickets", "clients", "rounds", "versions", "steps", "which", "share")
        return {n: t for n in names if (t := getattr(self, n)) is not None}

    def take(self, which: Tensor | slice) -> Orders:
        """The orders of some of the clients."""
        some: dict[str, Any] = {n: t[which] for n, t in self.columns().items()}
        return replace(self, **some)

    def deal(self, how: Arrangement) -> list[list[Orders]]:
        """Batches, dealt out to those who work at a time: every n-th batch to each, or, with shards, each its own clients'.

        Some of the shards may have nothing to do.
        """
        steps, orders = self.steps.numpy(), self
        if len(steps) and steps.min() < steps.max():  # those still at work must always be the first ones
            orders = self.take(torch.from_numpy((-steps).argsort(kind="stable")))
        if how.shards > 1:
            whose = orders.clients % how.shards
            return [orders.take(whose == shard).cut(how.chunk) for shard in range(how.shards)]
        batches = orders.cut(how.chunk)
        workers = min(how.workers, len(batches))
        return [batches[i::workers] for i in range(workers)]

    def cut(self, chunk: int) -> list[Orders]:
        """Batches of up to ``chunk`` clients."""
        return [self] if 0 < len(self) <= chunk else [self.take(slice(i, i + chunk)) for i in range(0, len(self), chunk)]


@dataclass
class Batch:
    """One batch of jobs that has been executed: what the clients send, its bytes, and what they want to keep."""

    tickets: Tensor
    versions: Tensor
    upload: Upload
    bytes_up: Tensor
    kept: Tensors
    written: Tensor
    """Whether the clients have written down what they want to keep, bool ``[C]``."""
    refused: Tensor | None = None
    """Whether the server does without what they sent, bool ``[C]``; it then weighs nothing. None: nobody is refused."""

    def named(self) -> Tensors:
        """All of it as named tensors, from which ``of`` makes it again."""
        own = {"versions": self.versions, "bytes": self.bytes_up, "tickets": self.tickets, "written": self.written}
        own |= {} if self.refused is None else {"refused": self.refused}
        return named(self.upload) | nested({"kept": self.kept, "job": own})

    @classmethod
    def of(cls, tensors: Tensors, device: torch.device) -> Batch:
        """A batch of what ``named`` made of one; raises ``KeyError`` where something is missing."""
        groups = grouped(tensors)
        job, kept = groups["job"], {n: t.to(device) for n, t in groups.get("kept", {}).items()}
        return cls(
            job["tickets"], job["versions"], upload_of(groups, device), job["bytes"], kept, job["written"], job.get("refused")
        )


def named(upload: Upload) -> Tensors:
    """An upload as named tensors."""
    own = {"clients": upload.clients, "weight": upload.weight, "loss": upload.loss}
    return nested({"sums": upload.sums, "rows": upload.rows, "senders": upload.senders, "own": own})


def upload_of(groups: dict[str, Tensors], device: torch.device) -> Upload:
    """An upload of what ``named`` made of one, grouped."""
    own, sums, rows, senders = ({n: t.to(device) for n, t in groups.get(g, {}).items()} for g in ("own", "sums", "rows", "senders"))
    return Upload(groups["own"]["clients"], own["weight"], sums, rows, senders, own["loss"])


@dataclass
class Lane:
    """What one worker has done: its batches, and running sums over them where only sums are wanted."""

    sums: Tensors = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)


@dataclass
class Trained:
    """What some clients have computed and not sent yet, and what they want to keep, ``[C, ...]``."""

    orders: Orders
    upload: Upload
    state: Tensors


class Executor:
    """Runs the client side of ``method`` in this process; nothing is remembered, so any work may be repeated.

    ``kept`` reads what clients keep; a crew that brings the rows of each batch along has none.
    """

    replaced = 0

    def __init__(
        self,
        problem: Problem,
        samples: Samples,
        tests: Samples,
        method: Method,
        codec: Codec,
        streams: Streams,
        kept: ClientState | None,
        paths: dict[str, GradientPath],
        shortcuts: bool,
        privacy: Mechanisms | None = None,
        adversaries: Adversaries | None = None,
    ) -> None:
        self.problem, self.samples, self.method, self.codec, self.streams = problem, samples, method, codec, streams
        self.kept, self.paths, self.privacy, self.adversaries, self.tests = kept, paths, privacy, adversaries, tests
        self.shortcuts = shortcuts and codec.plain and privacy is None and adversaries is None
        self.plan = method.plan()
        self._pool: ThreadPoolExecutor | None = None

    def run(self, orders: Orders, how: Arrangement, total: bool) -> list[Lane]:
        """See ``Crew``."""
        lanes = [batches for batches in orders.deal(how) if batches]
        torch.set_num_threads(how.threads)
        if self.adversaries is None or orders.own:
            return self._each(lambda batches: self.lane(batches, how, total), lanes, how)
        trained = self._each(lambda batches: [self.train(orders, how) for orders in batches], lanes, how)
        self.forge(trained)
        return self._each(lambda batches: self.sent(batches, total), trained, how)

    def close(self) -> None:
        """The threads end."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _each(self, work: Callable[[S], T], shares: list[S], how: Arrangement) -> list[T]:
        """``work`` on the share of every worker, all at a time."""
        if len(shares) == 1 or how.workers == 1:
            return [work(share) for share in shares]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(how.workers, initializer=torch.set_num_threads, initargs=(how.threads,))
        return list(self._pool.map(work, shares))

    def lane(self, batches: list[Orders], how: Arrangement, total: bool, kept: Tensors | None = None) -> Lane:
        """One worker's batches of clients: train and send, one batch after the other. ``kept``: rows of what they keep."""
        lane = Lane()
        for orders, rows in with_kept(batches, kept):
            self._send(self.train(orders, how, rows, lane.sums if total and self.shortcuts else None), lane, total)
        return lane

    def forge(self, lanes: list[list[Trained]]) -> None:
        """Have liars replace what they send, knowing what everybody else does; nothing where nobody lies."""
        work = [one for lane in lanes for one in lane]
        if self.adversaries is not None:
            self.adversaries.forge([one.upload for one in work], [one.orders.rounds for one in work], self.problem.layout_of)

    def sent(self, batches: list[Trained], total: bool) -> Lane:
        """One worker's batches that have been trained, sent."""
        lane = Lane()
        for trained in batches:
            self._send(trained, lane, total)
        return lane

    def train(self, orders: Orders, how: Arrangement, kept: Tensors | None = None, totals: Tensors | None = None) -> Trained:
        """One batch's work; with ``totals`` added to these where that is possible. ``kept``: rows of what the clients keep."""
        message, mixed = _message(orders)
        ctx = Context(
            problem=self.problem,
            path=self.paths[how.path],
            samples=self.samples,
            streams=self.streams,
            ids=orders.clients,
            rounds=orders.rounds,
            steps=orders.steps,
            message=message,
            mixed=mixed,
            state=self.what_is_kept(orders.clients) if kept is None else kept,
            plan=self.plan,
            lr=self._rate(orders.versions),
            local=self.method.local,
            clip=self.method.clip,
            totals=totals,
            tests=self.tests,
        )
        upload: Upload = getattr(self.method, orders.work)(ctx)
        return Trained(orders, upload, ctx.state)

    def what_is_kept(self, clients: Tensor) -> Tensors:
        """What ``clients`` keep, a row each."""
        return self.kept.read(clients) if self.kept is not None and self.kept.widths else {}

    def _send(self, trained: Trained, lane: Lane, total: bool) -> None:
        """Encode, and add up what only sums are needed of."""
        orders, upload, state = trained.orders, trained.upload, trained.state
        sending, refused = partial(self.sending, orders, state), None
        sizes = torch.zeros(len(orders), dtype=torch.int64) if orders.own else encode(upload, self.codec, state, sending)
        readable = self.privacy is None or self.privacy.masks is None
        if self.adversaries is not None and not orders.own and readable:  # what is masked nobody can read, to refuse it
            refused = self.adversaries.deliver(upload, orders.rounds, self.codec, sending)
        if self.privacy is not None:
            sizes, refused = self.privacy.protect(upload, sizes), None  # those refused count as zeros
        elif refused is not None:
            upload.weight = torch.where(refused.to(upload.weight.device), 0, upload.weight)
        if total:
            for name, values in upload.sums.items():
                if values.dim() > 1:
                    add(lane.sums, name, upload.weight, values)
            if not self.method.robust:
                upload.sums = {}  # rows of a finished batch need not stay in memory
        lane.batches.append(
            Batch(orders.tickets, orders.versions, upload, sizes, state, torch.zeros(len(orders), dtype=torch.bool), refused)
        )

    def sending(self, orders: Orders, state: Tensors, name: str, width: int) -> Sending:
        """How the clients send their vectors ``name`` of that width; what the codec keeps is among what the clients keep."""
        return Sending(
            layout=self.problem.layout_of(name, width),
            seeds=self.streams.seeds(f"codec.{name}", orders.clients, orders.rounds),
            share=orders.share,
            masks=self.method.masks,
            memory={row: state[key] for row in self.codec.keeps if (key := memory_key(name, row)) in state},
        )

    def _rate(self, versions: Tensor) -> float | Tensor:
        """The learning rate of each version, a number if it is the same for all, else ``[C, 1]``."""
        found = {v: self.method.lr.at(v) for v in set(versions.tolist())}
        if len(set(found.values())) == 1:
            return next(iter(found.values()))
        rates = [found[v] for v in versions.tolist()]
        return torch.tensor(rates, dtype=self.problem.dtype, device=self.problem.device)[:, None]


def _message(orders: Orders) -> tuple[Tensors, bool]:
    """What the clients received: one message for all, or a row a client where they differ."""
    if orders.own:
        return {name: rows[orders.which] for name, rows in orders.messages[0].items()}, True
    which = orders.which.tolist()
    if len(set(which)) == 1:
        return orders.messages[which[0]], False
    each = [orders.messages[i] for i in which]
    return {name: torch.stack([message[name] for message in each]) for name in each[0]}, True


def with_kept(batches: list[Orders], kept: Tensors | None) -> Iterator[tuple[Orders, Tensors | None]]:
    """Each batch with a copy of its rows of ``kept``; what clients keep is theirs to write in."""
    begin = 0
    for orders in batches:
        end = begin + len(orders)
        yield orders, None if kept is None else {name: rows[begin:end].clone() for name, rows in kept.items()}
        begin = end


def add(sums: Tensors, name: str, weight: Tensor, values: Tensor) -> None:
    """``sums[name] += sum_i weight_i values_i``."""
    known = sums.get(name)
    sums[name] = weight @ values if known is None else known.addmv_(values.t(), weight)


def joined(sums: Sequence[Tensors]) -> Tensors:
    """The sums of all workers added up in their memory: neighbours first, then pairs of pairs, so that it may be done in a tree."""
    while len(sums) > 1:
        sums = [_joined_two(*sums[i : i + 2]) for i in range(0, len(sums), 2)]
    return sums[0] if sums else {}


def _joined_two(one: Tensors, other: Tensors | None = None) -> Tensors:
    return one if other is None else {name: total.add_(other[name]) for name, total in one.items()}


def side_by_side(parts: list[Tensor], empty: Tensor) -> Tensor:
    """The parts one after the other; ``empty`` if there are none."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else empty


def weights_of(lanes: list[Lane]) -> tuple[np.ndarray, Tensor]:
    """Tickets and bytes of what has been executed."""
    batches = [batch for lane in lanes for batch in lane.batches]
    if not batches:
        return np.empty(0, np.int64), torch.empty(0, dtype=torch.int64)
    return torch.cat([b.tickets for b in batches]).numpy(), torch.cat([b.bytes_up for b in batches])


def memory_key(name: str, row: str) -> str:
    """Under which name clients keep a codec's row for the vectors ``name``."""
    return f"codec.{name}.{row}"


def encode(upload: Upload, codec: Codec, state: Tensors, sending: Callable[[str, int], Sending]) -> Tensor:
    """Replace what is sent by what arrives through the codec; returns the bytes of every client's message, int64 ``[C]``.

    ``sending(name, width)`` says how vectors are sent; what the codec keeps goes to ``state``.
    """
    scalars = {"weight": upload.weight[:1], "loss": upload.loss[:1]}
    vectors = {n: t for group in (upload.sums, upload.rows) for n, t in group.items()}
    scalars |= {n: vectors.pop(n)[0] for n in [n for n, t in vectors.items() if as_is(n, t.dtype)]}
    if codec.plain:
        one = {n: t if t.dim() == 1 else t[0] for n, t in vectors.items()}
        if not upload.senders:
            return torch.full((len(upload.clients),), wire_size({**one, **scalars}))
    sent = {n: upload.senders.get(n, torch.ones(len(upload.clients), dtype=torch.bool)).cpu() for n in vectors}
    if codec.plain:
        lengths = {n: there.long() - 1 for n, there in sent.items()}  # 0 where sent, else -1
        return _sizes(lengths, lambda kind: wire_size({**{n: one[n] for n in kind}, **scalars}), len(upload.clients))
    lengths, marks = {}, Tensors()
    for group in (upload.sums, upload.rows):
        for name in [n for n, t in group.items() if not as_is(n, t.dtype)]:
            how = sending(name, group[name].shape[1])
            before = dict(how.memory)
            arrived, size, kept = codec.roundtrip(group[name], how)
            if name in upload.senders:  # who does not send it does not send what is left over from before either
                there = sent[name].to(arrived.device)[:, None]
                arrived, kept = torch.where(there, arrived, 0), None if kept is None else kept & there
                for row, values in how.memory.items():
                    how.memory[row] = torch.where(there, values, before.get(row, torch.zeros_like(values)))
            group[name] = arrived
            if kept is not None and codec.sparse and group is upload.sums:
                marks |= _marks(name, kept, upload.weight)
            state |= {memory_key(name, row): values for row, values in how.memory.items()}
            lengths[name] = torch.where(sent[name], size, -1)
    upload.sums |= marks
    return _sizes(lengths, lambda kind: wire_size(scalars, kind), len(upload.clients))


def _marks(name: str, kept: Tensor, weight: Tensor) -> Tensors:
    """Which entries of ``name`` arrived, as sums: the weights of those who sent an entry, and how many they are."""
    each = kept.to(weight.dtype)
    return {f"{name}.kept": each, f"{name}.overlap": each / torch.where(weight > 0, weight, torch.inf)[:, None]}


def _sizes(lengths: Tensors, size: Callable[[dict[str, int]], int], clients: int) -> Tensor:
    """Bytes of every client's message from the lengths of its parts (-1: not sent), computed once a kind of message."""
    if not lengths:
        return torch.full((clients,), size({}))
    each = list(zip(*(length.tolist() for length in lengths.values()), strict=True))
    known = {kind: size({n: v for n, v in zip(lengths, kind, strict=True) if v >= 0}) for kind in dict.fromkeys(each)}
    return torch.tensor([known[kind] for kind in each])


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
