"""What jobs under way refer to: the messages that clients work from, and results the server has not collected yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanse.core.errors import CheckpointError
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.state import ClientState
from hanse.core.wire import grouped, nested
from hanse.engines.execution import Batch, Lane, add, joined, side_by_side
from hanse.fleet.clock import Clock, among

Tickets = NDArray[np.int64]


GONE = -1
"""Instead of its number: a job whose result has been taken."""


class Message(NamedTuple):
    """What was sent: the rule's ``work``, and the tensors it is done from."""

    work: str
    tensors: Tensors


class Result(NamedTuple):
    """A batch that has been executed, and which worker did it."""

    lane: int
    batch: Batch

    def rows(self, tickets: Tickets) -> Tickets:
        """The places of those of ``tickets`` that are in the batch."""
        return np.flatnonzero(among(self.batch.tickets.numpy(), tickets))


class Collected(NamedTuple):
    """Results as workers left them, and of those their sums with every contribution scaled, and the scale of each client."""

    lanes: list[Lane]
    scaled: list[Tensors]
    scale: Tensor | None

    def reply(self, nothing: Tensor, aggregate: Callable[[Tensor, Tensor], Tensor] | None, **about: Any) -> Reply:
        """What the server sees of them, without those it refuses. ``nothing`` is an empty tensor of the weights' type; where there
        is an ``aggregate``, single contributions are kept for it. ``about`` are those fields of a reply that are not in its jobs.
        """
        batches = [batch for lane in self.lanes for batch in lane.batches]
        uploads, none = [batch.upload for batch in batches], torch.zeros(0, dtype=torch.long)
        rows, senders, sums = (uploads[0].rows, uploads[0].senders, uploads[0].sums) if uploads else ({}, {}, {})
        reply = Reply(
            clients=side_by_side([u.clients for u in uploads], none),
            versions=side_by_side([b.versions for b in batches], none),
            weight=side_by_side([u.weight for u in uploads], nothing),
            sums=joined([lane.sums for lane in self.lanes if lane.sums]),
            rows={n: side_by_side([u.rows[n] for u in uploads], nothing) for n in rows},
            senders={n: side_by_side([u.senders[n] for u in uploads], none) for n in senders},
            loss=side_by_side([u.loss for u in uploads], nothing),
            scaled=None if self.scale is None else joined(self.scaled),
            scale=self.scale,
            each={} if aggregate is None else {n: side_by_side([u.sums[n] for u in uploads], nothing) for n in sums},
            aggregate=aggregate,
            **about,
        )
        if all(batch.refused is None for batch in batches):
            return reply
        return reply.without(torch.cat([torch.zeros_like(b.written) if b.refused is None else b.refused for b in batches]))


class Pending:
    """Messages and results, for as long as a job under way refers to them."""

    def __init__(self) -> None:
        self.messages: dict[int, Message] = {}
        self.results: list[Result] = []
        self._next = 0

    def post(self, work: str, tensors: Tensors) -> int:
        """The number of a message; the same again is the same message, also where a resumed run holds a copy of it."""
        last = self.messages.get(self._next - 1)
        if last is not None and last.work == work and all(_equal(last.tensors.get(n), t) for n, t in tensors.items()):
            return self._next - 1
        self.messages[self._next] = Message(work, tensors)
        self._next += 1
        return self._next - 1

    def store(self, lanes: list[Lane]) -> None:
        """Keep what was executed."""
        self.results += [Result(i, batch) for i, lane in enumerate(lanes) for batch in lane.batches]

    def remember(self, tickets: Tickets, kept: ClientState) -> None:
        """The clients write down what they want to keep of these jobs.

        They do so when a reply is collected, or at their next job if that comes first: work that is lost or thrown away leaves a
        client as it was.
        """
        for batch in (result.batch for result in self.results if result.batch.kept):
            due = torch.from_numpy(among(batch.tickets.numpy(), tickets)) & ~batch.written
            if bool(due.any()):
                kept.write(batch.upload.clients[due], {n: t[due] for n, t in batch.kept.items()})
                batch.written |= due

    def take(self, tickets: Tickets, scale: Tensor | None) -> Collected:
        """Remove and add up the results of ``tickets``; ``scale`` ``[len(tickets)]`` in their order."""
        found: dict[int, Lane] = {}
        scaled: dict[int, Tensors] = {}
        scales: dict[int, list[Tensor]] = {}
        order = np.argsort(tickets)
        for result in self.results:
            rows = result.rows(tickets)
            if not len(rows):
                continue
            batch, lane = _rows(result.batch, rows), found.setdefault(result.lane, Lane())
            lane.batches.append(batch)
            for name, values in batch.upload.sums.items():
                add(lane.sums, name, batch.upload.weight, values)
            if scale is None:
                continue
            mine = order[np.searchsorted(tickets, batch.tickets.numpy(), sorter=order)]
            own = scale[mine].to(batch.upload.weight)
            scales.setdefault(result.lane, []).append(own)
            for name, values in batch.upload.sums.items():
                add(scaled.setdefault(result.lane, {}), name, batch.upload.weight * own, values)
        self.drop(tickets)
        lanes = sorted(found)
        each = [own for i in lanes for own in scales.get(i, [])]  # in the order of the clients, which is that of the lanes
        return Collected([found[i] for i in lanes], [scaled[i] for i in lanes if scaled], torch.cat(each) if each else None)

    def drop(self, tickets: Tickets) -> None:
        """Remove the results of ``tickets``."""
        kept = []
        for result in self.results:
            held = result.batch.tickets.numpy()
            held[among(held, tickets)] = GONE
            left = np.flatnonzero(held != GONE)
            if len(left) > len(held) // 2:
                kept.append(result)
            elif len(left):  # a copy of the rest, so that one slow client does not hold a whole batch in memory
                kept.append(Result(result.lane, _rows(result.batch, left)))
        self.results = kept

    def forget(self, clock: Clock) -> None:
        """Drop messages and results that no job under way refers to any more."""
        used = {*clock.out["message"].tolist(), *clock.arrived["message"].tolist()}
        self.messages = {i: m for i, m in self.messages.items() if i in used}
        if not self.results:
            return
        there = np.concatenate([clock.out["ticket"], clock.arrived["ticket"]])
        known = np.concatenate([r.batch.tickets.numpy() for r in self.results])
        gone = known[(known != GONE) & ~among(known, there)]
        if len(gone):
            self.drop(gone)

    def mark(self) -> tuple[dict[int, Message], int]:
        """What ``take_back`` needs."""
        return dict(self.messages), self._next

    def take_back(self, mark: tuple[dict[int, Message], int], clock: Clock) -> None:
        """Back to when ``clock`` had these jobs; later results are dropped, to be executed again."""
        self.messages, self._next = mark
        jobs = np.concatenate([clock.out, clock.arrived])
        self.drop(jobs["ticket"][jobs["known"] == 0])
        self.forget(clock)

    def covers(self, clock: Clock) -> bool:
        """Whether all is there that the jobs of ``clock`` refer to."""
        jobs = np.concatenate([clock.out, clock.arrived])
        held = np.array([t for r in self.results for t in r.batch.tickets.tolist()], dtype=np.int64)
        return self.messages.keys() >= set(jobs["message"].tolist()) and bool(among(jobs["ticket"][jobs["known"] != 0], held).all())

    def snapshot(self) -> Tensors:
        """Named tensors from which ``restore`` brings everything back."""
        saved = {f"message.{i}.{m.work}.{n}": t for i, m in self.messages.items() for n, t in m.tensors.items()}
        for i, r in enumerate(self.results):
            saved |= nested({f"result.{i}": r.batch.named() | {"lane": torch.tensor([r.lane])}})
        return {**saved, "next": torch.tensor([self._next])}

    def restore(self, saved: Tensors, clock: Clock, device: torch.device) -> None:
        """Bring a snapshot back; raises ``CheckpointError`` if it lacks what the jobs of ``clock`` refer to."""
        try:
            self._restore(saved, device)
        except (KeyError, ValueError):
            raise CheckpointError("the checkpoint's work under way cannot be read") from None
        if not self.covers(clock):
            raise CheckpointError("the checkpoint's work under way is not complete")

    def _restore(self, saved: Tensors, device: torch.device) -> None:
        self.messages, self.results, self._next = {}, [], int(saved["next"])
        groups = grouped(saved)
        for number, tensors in grouped(groups.get("message", {})).items():
            for work, named in grouped(tensors).items():
                self.messages[int(number)] = Message(work, {n: t.to(device) for n, t in named.items()})
        for _, tensors in sorted(grouped(groups.get("result", {})).items(), key=lambda item: int(item[0])):
            self.results.append(Result(int(tensors.pop("lane")), Batch.of(tensors, device)))


def _equal(known: Tensor | None, t: Tensor) -> bool:
    return known is t or (known is not None and torch.equal(known, t))


def _rows(batch: Batch, rows: Tickets) -> Batch:
    """Some jobs of a batch; all of them without a copy."""
    if len(rows) == len(batch.tickets):
        return batch
    at, upload = torch.from_numpy(rows), batch.upload
    sums, seen, senders, kept = (
        {n: t[at] for n, t in group.items()} for group in (upload.sums, upload.rows, upload.senders, batch.kept)
    )
    part = Upload(upload.clients[at], upload.weight[at], sums, seen, senders, upload.loss[at])
    return Batch(
        batch.tickets[at],
        batch.versions[at],
        part,
        batch.bytes_up[at],
        kept,
        batch.written[at],
        None if batch.refused is None else batch.refused[at],
    )
