"""What every codec is: vectors to bytes and back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from hanse.core.errors import CodecError, ConfigError
from hanse.core.layout import Layout
from hanse.core.messages import Tensors
from hanse.core.part import Part, pipeline


@dataclass(frozen=True)
class Sending:
    """How vectors of one name are sent, axis 0 = client.

    ``seeds`` int64 ``[C]`` is what a codec draws from, and all it may: the same seed gives the same bytes. ``share`` float64
    ``[C]`` is the part of the entries that each client may send where the server has allotted that. ``memory`` has the rows
    ``[C, P]`` that these clients keep for this name between messages; a codec that keeps something replaces them. ``masks``:
    whether it is asked which entries were sent.
    """

    layout: Layout
    seeds: Tensor
    share: Tensor | None = None
    memory: Tensors = field(default_factory=dict)
    masks: bool = False

    @classmethod
    def of(cls, x: Tensor, layout: Layout | None = None, seed: int = 0) -> Sending:
        """One vector ``[P]`` of no particular layout."""
        return cls(layout or Layout({"": tuple(x.shape)}), torch.tensor([seed]))

    def only(self, i: int) -> Sending:
        """The same for client ``i`` alone, with a memory of its own."""
        here = slice(i, i + 1)
        memory = {name: rows[here] for name, rows in self.memory.items()}
        return replace(self, seeds=self.seeds[here], share=None if self.share is None else self.share[here], memory=memory)


class Sent(NamedTuple):
    """What arrives: ``values`` ``[C, P]``, the ``sizes`` of the messages in bytes, int64 ``[C]``, and which entries were sent
    at all, ``kept`` bool ``[C, P]`` (None: all of them).
    """

    values: Tensor
    sizes: Tensor
    kept: Tensor | None = None


class Links(NamedTuple):
    """The links of some clients, float64 ``[C]`` each."""

    up: Tensor
    """Bytes per second to the server."""
    latency: Tensor
    """Seconds for a message one way."""


class Codec(Part):
    """Base of all codecs. ``decode(encode(x))`` equals a row of ``roundtrip`` bit for bit, with the same number of bytes.

    A codec changes what the server receives, not what a client remembers of what it sent. ``a | b`` is first a, then b.
    """

    kind: ClassVar[str] = "codec"
    abstract: ClassVar[bool] = True
    plain: ClassVar[bool] = False
    """Whether tensors travel as they are."""
    keeps: ClassVar[tuple[str, ...]] = ()
    """Names of the rows a client keeps between messages."""

    @property
    def sparse(self) -> bool:
        """Whether some entries are not sent at all, or only in sum."""
        return False

    @property
    def corrects(self) -> bool:
        """Whether it scales up what it sends, to make up for what it leaves out."""
        return any(stage.corrects for stage in self.chained() if stage is not self)

    def encode(self, x: Tensor, sending: Sending | None = None) -> bytes:
        """A vector ``[P]`` as bytes."""
        raise TypeError(f"{type(self).__name__} does not define encode")

    def decode(self, data: bytes, layout: Layout | None = None) -> Tensor:
        """Bytes back to a vector; raises ``CodecError`` on anything that ``encode`` did not make, and where a ``layout`` is given
        on anything that does not have its size.
        """
        raise TypeError(f"{type(self).__name__} does not define decode")

    def roundtrip(self, rows: Tensor, sending: Sending) -> Sent:
        """``[C, P]`` to what arrives; may change ``rows``."""
        one = [sending.only(i) for i in range(len(rows))]
        coded = [self.encode(row, each) for row, each in zip(rows, one, strict=True)]
        values = [self.decode(data, sending.layout) for data in coded]
        sending.memory.update({name: torch.cat([each.memory[name] for each in one]) for name in self.keeps})
        return Sent(torch.stack(values).to(rows.device), torch.tensor([len(data) for data in coded]))

    def allot(self, links: Links, size: int) -> Tensor | None:
        """What share of ``size`` entries each client of a cohort may send, float64 ``[C]``, if the server decides that."""
        return None

    @classmethod
    def parse(cls, text: str) -> Self:
        """As for every part, and ``a | b`` for a chain."""
        stages = pipeline(text)
        if len(stages) == 1:
            return super().parse(text)
        return reduce(or_, map(cls.parse, stages))

    def chained(self) -> tuple[Codec, ...]:
        """The stages it is made of; none if it is no chain."""
        return ()

    def __or__(self, then: Codec) -> Codec:
        for codec in (self, then):
            if not codec.chained():
                raise ConfigError(f"codec: {self} | {then} is not allowed: {codec} is no stage; it goes around a chain, or alone")
        return Codec.named("chain")(stages=(*self.chained(), *then.chained()))


class identity(Codec):
    """The tensors as they are: message bytes are those of the safetensors file."""

    plain: ClassVar[bool] = True

    def encode(self, x: Tensor, sending: Sending | None = None) -> bytes:
        from safetensors.torch import save

        return save({"x": x.contiguous()})

    def decode(self, data: bytes, layout: Layout | None = None) -> Tensor:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors: Tensors = load(data)
        except (SafetensorError, KeyError, ValueError) as error:
            raise CodecError(f"not a valid encoding: {error}") from None
        if set(tensors) != {"x"} or tensors["x"].dim() != 1 or (layout is not None and len(tensors["x"]) != layout.size):
            raise CodecError(f"identity: got {[(n, tuple(t.shape)) for n, t in tensors.items()]}, expected a vector 'x'")
        return tensors["x"]
