"""Clients' work in other processes: what goes there and comes back as named tensors, whatever carries them.

A worker has an ``Executor`` of its own, made from a ``Recipe``. It gets the orders of everybody who works at a time, which are the
same for all, and the rows of what the clients of its own lane keep, and returns that lane. Nothing is remembered there, so work
that is lost with a worker is done again by another one, to the same bits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from hanse.codecs.base import Codec
from hanse.core.gradients import paths
from hanse.core.messages import Tensors
from hanse.core.samples import Samples
from hanse.core.streams import Streams
from hanse.core.wire import About, grouped, nested
from hanse.data import Split
from hanse.engines.base import Arrangement
from hanse.engines.execution import Batch, Executor, Lane, Orders, Trained, named, upload_of, with_kept
from hanse.federation import Federation
from hanse.methods.base import Method


@dataclass(frozen=True)
class Recipe:
    """What a worker's executor is made of, without the data."""

    federation: Federation
    method: Method
    codec: Codec
    seed: int
    bf16: bool
    shortcuts: bool

    @classmethod
    def of(cls, executor: Executor, federation: Federation, bf16: bool) -> Recipe:
        """The recipe of ``executor``."""
        return cls(federation.bare(), executor.method, executor.codec, executor.streams.seed, bf16, executor.shortcuts)

    def executor(self, data: Tensors) -> Executor:
        """An executor on these data, as ``data_of`` names them."""
        groups, federation = grouped(data), copy.copy(self.federation)
        train = Samples(**groups["train"]).to(federation.device)
        test = Samples(**{"x": train.x, "y": train.y, **groups["test"]}).to(federation.device)
        federation.split = Split(train, test, test.x[:0], test.y[:0])
        problem = federation.problem
        return Executor(
            problem,
            train,
            test,
            self.method,
            self.codec,
            Streams(self.seed),
            None,
            paths(problem, self.bf16),
            self.shortcuts,
        )


def data_of(train: Samples, test: Samples) -> Tensors:
    """The clients' samples as named tensors; of test samples that lie among those for training, only which they are."""
    return nested({"train": _parts(train, {}), "test": _parts(test, {"x": train.x, "y": train.y})})


def _parts(samples: Samples, known: Tensors) -> Tensors:
    each = {n: t for n in ("x", "y", "offsets", "index", "domains") if (t := getattr(samples, n)) is not None}
    return {n: t for n, t in each.items() if known.get(n) is not t}


class Request:
    """Orders for everybody who works at a time, and until where."""

    def __init__(self, orders: Orders, how: Arrangement, total: bool, send: bool) -> None:
        self.lanes = orders.deal(how)
        messages = {f"message.{i}.{n}": t for i, message in enumerate(orders.messages) for n, t in message.items()}
        self.tensors = messages | nested({"orders": orders.columns()})
        what = {"work": orders.work, "own": orders.own, "how": how, "total": total, "send": send}
        self.about = {"request": json.dumps(what)}

    def kept(self, executor: Executor) -> dict[int, Tensors]:
        """The rows of what the clients of each lane keep, for those that have something to do."""
        return {i: executor.what_is_kept(torch.cat([o.clients for o in lane])) for i, lane in enumerate(self.lanes) if lane}


def answer(executor: Executor, tensors: Tensors, about: About, lane: int, kept: Tensors) -> Tensors:
    """A worker's side: do one lane of a ``Request``."""
    what, groups = json.loads(about["request"]), grouped(tensors)
    messages = [m for _, m in sorted(grouped(groups.get("message", {})).items(), key=lambda item: int(item[0]))]
    how = Arrangement(*what["how"])
    orders = Orders(what["work"], messages, **groups["orders"], own=what["own"])
    torch.set_num_threads(how.threads)
    batches = orders.deal(how)[lane]
    if what["send"]:
        done = executor.lane(batches, how, what["total"], kept)
        return nested({"sums": done.sums} | {str(i): batch.named() for i, batch in enumerate(done.batches)})
    trained = [executor.train(own, how, rows) for own, rows in with_kept(batches, kept)]
    return nested({str(i): named(one.upload) | nested({"kept": one.state}) for i, one in enumerate(trained)})


def lane_of(reply: Tensors, device: torch.device) -> Lane:
    """What a worker sent back that trained and sent."""
    groups = grouped(reply)
    sums = {n: t.to(device) for n, t in groups.pop("sums", {}).items()}
    return Lane(sums, [Batch.of(groups[str(i)], device) for i in range(len(groups))])


def trained_of(reply: Tensors, batches: list[Orders], device: torch.device) -> list[Trained]:
    """What a worker sent back that trained only."""
    found, groups = [], grouped(reply)
    for i, orders in enumerate(batches):
        parts = grouped(groups[str(i)])
        kept = {n: t.to(device) for n, t in parts.get("kept", {}).items()}
        found.append(Trained(orders, upload_of(parts, device), kept))
    return found


class Hands(Protocol):
    """Workers and the way to them."""

    replaced: int
    """How many were lost and replaced so far."""

    def work(self, tensors: Tensors, about: About, kept: Mapping[int, Tensors]) -> list[Tensors]:
        """Have ``answer`` called for the lanes that ``kept`` has; their replies, in this order.

        The first reply may have the ``joined`` sums of all lanes, if then the others have none. A worker that is lost is replaced,
        and its lane done again.
        """
        ...

    def close(self) -> None:
        """No more work."""
        ...


class Remote:
    """A crew behind ``hands``. Where somebody has to see what all clients send (liars) or holds the exchange's secrets (privacy),
    clients are only trained there; the rest is done by ``executor``, here.
    """

    def __init__(self, executor: Executor, hands: Hands) -> None:
        self.executor, self.hands = executor, hands

    @property
    def replaced(self) -> int:
        """See ``Crew``."""
        return self.hands.replaced

    def run(self, orders: Orders, how: Arrangement, total: bool) -> list[Lane]:
        """See ``Crew``."""
        executor, device = self.executor, self.executor.problem.device
        send = orders.own or (executor.adversaries is None and executor.privacy is None)
        request = Request(orders, how, total, send)
        kept = request.kept(executor)
        replies = self.hands.work(request.tensors, request.about, kept)
        if send:
            return [lane_of(reply, device) for reply in replies]
        trained = [trained_of(reply, request.lanes[i], device) for i, reply in zip(kept, replies, strict=True)]
        executor.forge(trained)
        return [executor.sent(batches, total) for batches in trained]

    def close(self) -> None:
        """See ``Crew``."""
        self.hands.close()
