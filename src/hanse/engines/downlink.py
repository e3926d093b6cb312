"""What the server sends, as clients receive it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hanse.codecs.base import Codec, Sending
from hanse.core.errors import ConfigError
from hanse.core.layout import Layout
from hanse.core.messages import Tensors
from hanse.core.streams import Streams
from hanse.core.wire import wire_size
from hanse.engines.execution import as_is


class Downlink:
    """The way down through ``codec``; ``layout_of(name, size)`` is the layout of a vector."""

    def __init__(self, codec: Codec, layout_of: Callable[[str, int], Layout], streams: Streams) -> None:
        self.codec, self.layout_of, self.streams = codec, layout_of, streams
        self._last: tuple[int, Tensors, Tensors, int] = (-1, {}, {}, 0)

    def send(self, message: Tensors, clients: Tensor, parts: Tensor | None, round: int) -> tuple[list[Tensors], Tensor]:
        """What ``clients`` receive of ``message``, once if it is the same for all, and its bytes, int64 ``[C]``.

        ``parts`` float64 ``[C]``: what part of its vectors each gets. The same message is encoded once a round.
        """
        if parts is not None:
            return self._in_parts(message, clients, parts, round)
        if self.codec.plain:
            return [message], torch.full((len(clients),), wire_size(message))
        if self.codec.sparse:
            raise ConfigError(f"down: {self.codec} is not allowed here: only synchronous sends each client its part of a message")
        before, known, received, size = self._last
        if before != round or known.keys() != message.keys() or any(known[n] is not t for n, t in message.items()):
            whom, rest = torch.zeros(1, dtype=torch.long), message.copy()
            sent = {n: self.codec.roundtrip(rest.pop(n)[None].clone(), self._sending(n, t, whom, round)) for n, t in coded(message)}
            received = {**message, **{n: s.values[0] for n, s in sent.items()}}
            size = wire_size(rest, {n: int(s.sizes) for n, s in sent.items()})
            self._last = round, message, received, size
        return [received], torch.full((len(clients),), size)

    def letters(self, message: Tensors, clients: Tensor, parts: Tensor | None, round: int) -> list[Tensors]:
        """What travels to each of ``clients`` for them to receive what ``send`` says, an array of bytes for each vector coded."""
        if parts is None and (self.codec.plain or not len(clients)):
            return [message] * len(clients)
        if parts is None:
            whom = torch.zeros(1, dtype=torch.long)
            return [self._letter(message, whom, None, round, 0)] * len(clients)
        return [self._letter(message, clients, parts, round, i) for i in range(len(clients))]

    def _letter(self, message: Tensors, whom: Tensor, parts: Tensor | None, round: int, i: int) -> Tensors:
        written = message.copy()
        for name, vector in coded(message):
            data = self.codec.encode(vector.clone(), self._sending(name, vector, whom, round, parts).only(i))
            written[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return written

    def _in_parts(self, message: Tensors, clients: Tensor, parts: Tensor, round: int) -> tuple[list[Tensors], Tensor]:
        if not len(clients):
            return [], torch.zeros(0, dtype=torch.int64)
        rest, whole = message.copy(), len(clients)
        sent = {
            n: self.codec.roundtrip(rest.pop(n).repeat(whole, 1), self._sending(n, t, clients, round, parts))
            for n, t in coded(message)
        }
        each = [{**rest, **{n: s.values[i] for n, s in sent.items()}} for i in range(whole)]
        return each, torch.tensor([wire_size(rest, {n: int(s.sizes[i]) for n, s in sent.items()}) for i in range(whole)])

    def _sending(self, name: str, vector: Tensor, whom: Tensor, round: int, parts: Tensor | None = None) -> Sending:
        return Sending(self.layout_of(name, len(vector)), self.streams.seeds(f"down.{name}", whom, round), parts)


def coded(message: Tensors) -> list[tuple[str, Tensor]]:
    """What of a message a codec writes."""
    return [(n, t) for n, t in message.items() if t.dim() == 1 and not as_is(n, t.dtype)]
