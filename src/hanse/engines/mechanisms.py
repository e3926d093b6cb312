"""What keeps the clients of one run private: the mechanisms between what they have computed and what the server gets.

With both, in this order: clients clip, turn what they send into integers and mask them; the server adds, and then the noise. The
masks cancel exactly, so this engine leaves them out: the sum of the integers is bit for bit the one the protocol would give, and
its bytes are counted. Who is asked and does not reply has left before sending its masked vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hanse.codecs.base import Codec
from hanse.core.errors import CheckpointError, ConfigError
from hanse.core.messages import Reply, Tensors, Upload
from hanse.core.streams import Streams
from hanse.federation import Federation
from hanse.fleet.traces import always
from hanse.methods.base import Method
from hanse.privacy import Privacy, differential, secure
from hanse.privacy.differential import Draw
from hanse.privacy.secure import Fixed
from hanse.schedules.network import Schedule

INTEGERS, LOSS = "integers", "loss"
"""The name of all sums of a client as one vector of integers, and of the training loss in it."""


class Mechanisms:
    """The ``parts`` of a run's privacy, at most one of a kind. ``bound``, ``differential``'s, is part of the run's state.

    Raises ``ConfigError`` where a mechanism would not keep its promise under this schedule, rule, codec or fleet.
    """

    def __init__(
        self, parts: Sequence[Privacy], schedule: Schedule, method: Method, codec: Codec, federation: Federation, streams: Streams
    ) -> None:
        names = [type(part).__name__ for part in parts]
        if len(set(names)) < len(names):
            raise ConfigError(f"privacy: {', '.join(map(str, parts))} is not allowed: at most one of a kind")
        for part in parts:
            if type(part) not in (differential, secure):
                raise ConfigError(f"privacy: {part} is not allowed: this engine knows differential and secure")
            if not codec.plain:
                why = "what arrives may exceed the bound" if type(part) is differential else "encoded vectors cannot be added"
                raise ConfigError(f"codec: {codec} is not allowed with {type(part).__name__}: {why}; use identity")
        if method.robust:
            raise ConfigError(
                f"aggregate: {method.aggregate} is not allowed with privacy: it needs to see what single clients send"
            )
        self.noise: differential | None = next((part for part in parts if isinstance(part, differential)), None)
        self.masks: secure | None = next((part for part in parts if isinstance(part, secure)), None)
        self.problem, self.streams, self.clients = federation.problem, streams, federation.clients
        weights = method.weight(federation.split.train.counts().to(self.problem.dtype))
        self.heaviest = float(weights.max())
        self.bound, self.cohort = 0.0, 0
        self.draw: Draw = "fixed"
        self.asked = torch.zeros(0, dtype=torch.long)
        self.widths: dict[str, int] = {}
        """Length of every vector that a client sends, by name."""
        if self.masks is not None:
            self._check_masks(self.masks, schedule)
        if self.noise is not None:
            self._check_noise(self.noise, schedule, method, weights, federation)

    def __str__(self) -> str:
        return ", ".join(str(part) for part in (self.noise, self.masks) if part is not None)

    def _check_masks(self, masks: secure, schedule: Schedule) -> None:
        if not schedule.barrier:
            raise ConfigError(
                f"schedule: {schedule} is not allowed with secure: a sum is over clients that are asked together and wait for each "
                "other; use synchronous or cyclic"
            )
        if self.problem.shared_buffers.dim() > 1:
            raise ConfigError("buffers: 'domain' is not allowed with secure: the server would have to see each client's statistics")

    def _check_noise(
        self, noise: differential, schedule: Schedule, method: Method, weights: Tensor, federation: Federation
    ) -> None:
        drawn = schedule.sampling()
        if drawn is None:
            raise ConfigError(
                f"schedule: {schedule} is not allowed with differential: epsilon is known only where nothing but chance decides "
                "who counts in a round; use synchronous without over, deadline and least"
            )
        self.cohort, self.draw = drawn
        if self.draw == "fixed" and federation.fleet.trace != always():
            raise ConfigError(
                f"fleet: {federation.fleet.trace} is not allowed with differential and draw='fixed': the fewer clients are there, "
                "the likelier each is drawn; use synchronous(draw='bernoulli')"
            )
        if method.opens:
            raise ConfigError(f"method: {method} is not allowed with differential: every client sends before round 0")
        if not bool((weights == 1).all()):
            name = type(method).__name__
            raise ConfigError(
                f"method: {method} is not allowed with differential: clients weigh differently, which no noise hides; "
                f"use {name}(weights='uniform')"
            )
        if federation.problem.shares_buffers:
            raise ConfigError(
                f"buffers: {federation.buffers!r} is not allowed with differential: batch-norm statistics cannot be clipped; use "
                "'private', or a model without batch norm"
            )
        noise.scales(self.cohort)
        noise.epsilon(1, self.cohort, self.clients, self.draw)  # raises what there is to raise before any work
        self.bound = noise.clip

    # ---- one exchange

    def ask(self, clients: Tensor) -> int:
        """An exchange with ``clients`` begins; the bytes that the protocol sends each of them."""
        self.asked = clients
        return 0 if self.masks is None else self.masks.traffic(len(clients), 0)[0]

    def up(self) -> int | None:
        """Bytes that each client sends in the exchange in place of its message; None: its message."""
        return None if self.masks is None else self.masks.traffic(len(self.asked), 1 + sum(self.widths.values()))[1]

    @property
    def fixed(self) -> Fixed:
        """The exchange's numbers; meaningful with ``secure`` alone."""
        assert self.masks is not None
        return self.masks.fixed(max(1, len(self.asked)), self.heaviest)

    def protect(self, upload: Upload, sizes: Tensor) -> Tensor:
        """What a client does before it sends: ``upload`` is changed in place; the bytes of every client's message, int64 ``[C]``.

        Raises ``PrivacyError`` where something cannot be kept private.
        """
        if not bool(upload.loss.isfinite().all()):
            return sizes  # the round is over, and why is told better than by its contributions
        for part in (self.noise, self.masks):
            if part is not None:
                part.check(upload)
        if self.noise is not None:
            upload.sums = self.noise.protect(upload.sums, upload.weight, self.bound)
        if self.masks is not None:
            limit = self.masks.clip
            upload.sums = {**upload.sums, LOSS: upload.loss[:, None].clamp(-limit, limit)}  # a report; it stops no run
        self.widths = {name: rows.shape[1] for name, rows in upload.sums.items()}
        if self.masks is None:
            return sizes
        integers = self.fixed.encode(upload.sums, upload.weight)
        signed = integers.view(f"<i{integers.itemsize}").astype("int64")
        upload.sums, upload.weight = {INTEGERS: torch.from_numpy(signed)}, torch.ones(len(signed), dtype=torch.int64)
        return torch.full_like(sizes, self.up() or 0)

    def enough(self, came: Tensor, round: int) -> None:
        """Raise ``PrivacyError`` if those who ``came`` are too few of those asked for their sum to be unmasked."""
        if self.masks is not None and len(self.asked):
            ring = self.asked[torch.from_numpy(self.streams.numpy("privacy/ring", round=round).permutation(len(self.asked)))]
            self.masks.enough(torch.isin(ring, came).numpy())

    def reply(self, reply: Reply, round: int) -> Reply:
        """What the server gets to see of ``reply``; a release of noised sums even if nobody came."""
        like = self.problem.start
        if self.masks is not None and len(reply):
            total = reply.sums[INTEGERS].numpy().astype(self.masks.dtype)
            sums, weight = self.fixed.decode(total, self.widths)
            mean = float(sums.pop(LOSS)) / weight if weight else float("nan")
            reply = replace(
                reply,
                sums={name: values.to(like) for name, values in sums.items()},
                weight=like.new_full((len(reply),), weight / len(reply)),  # the server does not learn single ones
                loss=like.new_full((len(reply),), mean),
                total=weight,
            )
        if self.noise is None:
            return reply
        nothing = {name: like.new_zeros(width) for name, width in self.widths.items() if name != LOSS}
        sums, self.bound = self.noise.release(reply.sums or nothing, self.bound, self.cohort, self.streams, round)
        weights = reply.weight if len(reply) else like.new_ones(self.cohort)  # as if the expected number had sent zeros
        return replace(reply, sums=sums, weight=weights, total=float(self.cohort), noised=True)

    # ---- over the run

    def epsilon(self, rounds: int) -> float | None:
        """What ``rounds`` releases have cost, at the part's delta; None without ``differential``."""
        return None if self.noise is None else self.noise.epsilon(rounds, self.cohort, self.clients, self.draw)

    def snapshot(self) -> Tensors:
        """Named tensors from which ``restore`` goes on."""
        return {} if self.noise is None else {"bound": torch.tensor([self.bound], dtype=torch.float64)}

    def restore(self, saved: Tensors) -> None:
        """Bring a snapshot back; raises ``CheckpointError`` if it is not one of this run."""
        if saved.keys() != self.snapshot().keys():
            raise CheckpointError("the checkpoint does not belong to this run: another privacy")
        if self.noise is not None:
            self.bound = float(saved["bound"])
