"""What travels between nodes that all exchange their models at the same time, and what of it arrives."""

from __future__ import annotations

import torch
from torch import Tensor

from hanse.codecs.base import Codec, Sending
from hanse.core.errors import ConfigError
from hanse.core.layout import Layout
from hanse.core.streams import Streams
from hanse.core.wire import wire_size
from hanse.fleet.clock import Clock, nanoseconds
from hanse.topologies import Mixing


class Exchanges:
    """The exchanges of a run between ``nodes`` nodes, and what each has sent and received by them: bytes, int64 ``[N, 2]``.

    A message is counted once, with what was sent. Nodes send to their neighbours one after the other and receive from them one
    after the other; an exchange is over when the last message has arrived. Raises ``ConfigError`` on a codec under which a model
    that arrives is no model.
    """

    def __init__(self, codec: Codec, layout: Layout, clock: Clock, streams: Streams, nodes: int) -> None:
        if codec.keeps or codec.sparse:
            raise ConfigError(f"codec: {codec} is not allowed between peers: what they send are models, so every number counts")
        self.codec, self.layout, self.clock, self.streams = codec, layout, clock, streams
        self.traffic = torch.zeros(nodes, 2, dtype=torch.int64)
        self._round, self._number = -1, 0

    def send(self, models: Tensor, mixing: Mixing, round: int) -> tuple[Tensor, Mixing]:
        """Every node's row of ``models`` ``[N, P]`` to its neighbours: what they have of it, and the weights of what arrived."""
        self._number = self._number + 1 if round == self._round else 0
        self._round, nodes = round, torch.arange(len(models))
        if self.codec.plain:
            arrived, sizes = models, torch.full((len(models),), wire_size({"x": models[0]}))
        else:
            seeds = self.streams.seeds(f"codec.exchange.{self._number}", nodes, round)
            sent = self.codec.roundtrip(models.clone(), Sending(self.layout, seeds))
            sizes = torch.tensor([wire_size({}, {"x": int(size)}) for size in sent.sizes])
            arrived = sent.values
        left = self._lose(mixing, nodes, round)
        self._count(sizes, mixing, left)
        return arrived, left

    def _count(self, sizes: Tensor, mixing: Mixing, left: Mixing) -> None:
        senders, receivers = mixing.neighbours, mixing.receivers
        sent = torch.bincount(senders, minlength=len(sizes)) * sizes
        received = torch.zeros_like(sent).index_add_(0, left.receivers, sizes[left.neighbours])
        self.traffic += torch.stack([sent, received], 1)
        self.clock.up += int(sent.sum())
        profile = self.clock.profile(torch.arange(len(sizes)))
        if profile is not None and len(senders):
            out, back = profile.latency + sent / profile.up, profile.latency + received / profile.down
            self.clock.go_on(self.clock.time + int(nanoseconds((out[senders] + back[receivers]).max())))

    def _lose(self, mixing: Mixing, nodes: Tensor, round: int) -> Mixing:
        """The messages that links lose: what arrives nowhere has no weight."""
        profile = self.clock.profile(nodes)
        if profile is None or not bool((profile.loss > 0).any()) or not len(mixing.neighbours):
            return mixing
        senders, receivers = mixing.neighbours, mixing.receivers
        drawn = self.streams.uniform("exchange.loss", senders, round, extra=receivers + self._number * len(nodes))[:, 0]
        lost = drawn < 1 - (1 - profile.loss[senders]) * (1 - profile.loss[receivers])
        self.clock.lost += int(lost.sum())
        return mixing.losing(lost)
