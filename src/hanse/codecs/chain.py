"""A chain of stages: what is sent, in how many bits a number, and how densely that is written.

    layers   |   select or shrink   |   quantise      |   write                  |   squeeze
    layers       topk, lowrank, ...     uniform, ...      gaps, huffman, ...         zstd

Stages that select, shrink or quantise rewrite a ``Load`` and are all that changes numbers: on all clients side by side in a
simulation, on one client when it encodes, with the same result. A coder writes a client's load without loss, and says how long that
is without writing it.

Each layer is written as the number of its entries that are sent, plus one (varint; 0: the layer follows as it is); the seed; the
table; what the coder makes of places and symbols; then the values, if no stage has turned them into symbols.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hanse.codecs.base import Codec, Links, Sending, Sent
from hanse.codecs.wire import FRAME, Buffer, Reader, frame, raw, unframe, varint, varint_size
from hanse.core.errors import CodecError, ConfigError
from hanse.core.layout import Layout


@dataclass(frozen=True)
class Load:
    """What C clients send of one layer of ``shape`` with ``size`` entries, axis 0 = client.

    ``values`` ``[C, m]`` float32 or float64: the numbers to be sent. Of a row only the first ``counts[i]`` are (None: all).
    ``places`` int64 ``[C, m]``: which of the layer's entries they are, rising, and ``size`` beyond ``counts`` (None: they are no
    entries, or all of them). ``symbols`` uint8 ``[C, m]``, below ``levels``, stand for the values once a stage has quantised them,
    and ``table`` ``[C, q]`` says what they mean. ``seeds`` int64 ``[C]``: what the reader has to draw from, as the sender did.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    values: Tensor
    counts: Tensor | None = None
    places: Tensor | None = None
    symbols: Tensor | None = None
    levels: int = 0
    table: Tensor | None = None
    seeds: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Entries sent by each client, int64 ``[C]``."""
        clients, most = self.values.shape
        return torch.full((clients,), most) if self.counts is None else self.counts

    @property
    def there(self) -> Tensor | None:
        """Which values are sent, bool ``[C, m]``; None for all."""
        if self.counts is None:
            return None
        return torch.arange(self.values.shape[1], device=self.values.device) < self.counts.to(self.values.device)[:, None]


class Composed(Codec):
    """Base of what stands for a chain: in every respect that of the stages it is ``chained`` of."""

    abstract: ClassVar[bool] = True

    @cached_property
    def _chain(self) -> chain:
        return chain(stages=self.chained())

    def encode(self, x: Tensor, sending: Sending | None = None) -> bytes:
        return self._chain.encode(x, sending)

    def decode(self, data: bytes, layout: Layout | None = None) -> Tensor:
        return self._chain.decode(data, layout)

    def roundtrip(self, rows: Tensor, sending: Sending) -> Sent:
        return self._chain.roundtrip(rows, sending)

    @property
    def sparse(self) -> bool:
        return self._chain.sparse


class Stage(Composed):
    """Base of what a chain is made of; a stage alone is a chain of one."""

    abstract: ClassVar[bool] = True
    place: ClassVar[int] = 0
    """Where in a chain it stands: layers, select or shrink, quantise, write, squeeze."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Which layers it treats differently, by patterns of their names."""
        return ()

    def chained(self) -> tuple[Codec, ...]:
        return (self,)


class layers(Stage):
    """From here on every parameter tensor by itself, with its own selection, scale and codebook."""


class Transform(Stage):
    """Base of the stages that change numbers. What a reader must know before it reads does not depend on the numbers."""

    abstract: ClassVar[bool] = True
    placed: ClassVar[bool] = False
    """Whether it chooses places, which are sent."""
    drawn: ClassVar[bool] = False
    """Whether the reader needs the seed."""
    ragged: ClassVar[bool] = False
    """Whether clients may send different numbers of entries."""
    bare: ClassVar[bool] = True
    """Whether a layer that is not finite may travel as it is."""

    tells: ClassVar[bool] = False
    """Whether its table is not finite where the numbers are not, so that nobody else need look."""

    @property
    def levels(self) -> int:
        """How many symbols there are; 0: values stay numbers."""
        return 0

    def most(self, shape: tuple[int, ...]) -> int:
        """Entries it sends of a layer of this shape; at most so many if it is ``ragged``."""
        return math.prod(shape)

    def columns(self, count: int) -> int:
        """Numbers in the table for ``count`` entries."""
        return 0

    def sent_as(self, dtype: torch.dtype) -> torch.dtype:
        """Type in which values travel."""
        return dtype

    def forward(self, load: Load, sending: Sending) -> Load:
        """What is sent instead of ``load``, whose numbers are finite and stay as they are."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def backward(self, load: Load) -> Load:
        """What the receiver makes of it."""
        raise TypeError(f"{type(self).__name__} does not define backward")


class Select(Transform):
    """Base of the stages that send fewer numbers."""

    abstract: ClassVar[bool] = True
    place: ClassVar[int] = 1
    layered: ClassVar[bool] = False
    """Whether it needs the shapes of layers."""

    def places(self, load: Load) -> Tensor | None:
        """Which entries are sent, int64 ``[C, m]``, ``size`` for none; None if what is sent are no entries."""
        return load.places


class Quantise(Transform):
    """Base of the stages that send shorter numbers."""

    abstract: ClassVar[bool] = True
    place: ClassVar[int] = 2


class Coder(Stage):
    """Base of the lossless ways to write places and symbols; each takes what there is of both."""

    abstract: ClassVar[bool] = True
    place: ClassVar[int] = 3

    def write(self, size: int, places: Tensor | None, symbols: Tensor | None, levels: int) -> list[Buffer]:
        """One client's ``places`` int64 ``[m]``, rising and below ``size``, and ``symbols`` uint8 ``[m]``, below ``levels``."""
        raise TypeError(f"{type(self).__name__} does not define write")

    def read(self, reader: Reader, size: int, count: int, placed: bool, levels: int) -> tuple[Tensor | None, Tensor | None]:
        """The ``count`` places (if ``placed``) and symbols (if there are ``levels``); raises ``CodecError`` on anything ``write``
        does not make.
        """
        raise TypeError(f"{type(self).__name__} does not define read")

    def sizes(self, load: Load) -> Tensor:
        """Bytes that ``write`` makes for each client, int64 ``[C]``."""
        raise TypeError(f"{type(self).__name__} does not define sizes")


class Squeeze(Stage):
    """Base of the general-purpose compressors, which see only bytes."""

    abstract: ClassVar[bool] = True
    place: ClassVar[int] = 4

    def squeeze(self, data: bytes) -> bytes:
        """Fewer bytes, if possible."""
        raise TypeError(f"{type(self).__name__} does not define squeeze")

    def restore(self, data: bytes, most: int) -> bytes:
        """The bytes, of which there are at most ``most``; raises ``CodecError``."""
        raise TypeError(f"{type(self).__name__} does not define restore")


SMALL = 2048
"""Entries that no layer is longer than, besides 64 times its own: tables, code lengths and counts of 256 symbols."""


class chain(Codec):
    """Stages one after another, written ``topk(0.01) | uniform(8) | gaps``. A layer that is not finite travels as it is."""

    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    """In the order: layers, what selects, what quantises, what writes, what squeezes; at most one of each."""

    @model_validator(mode="after")
    def _in_order(self) -> chain:
        kinds = [stage.place for stage in self.stages]
        if kinds != sorted(set(kinds)):
            raise ValueError(
                "a chain is layers, what selects, what quantises, what writes and what squeezes, "
                "in this order and at most one of each"
            )
        for stage in self.stages:
            if isinstance(stage, Select) and stage.layered and not isinstance(self.stages[0], layers):
                raise ValueError(f"codec: {self} is not allowed: {stage} is for matrices, write layers | {self}")
            if stage.patterns and not isinstance(self.stages[0], layers):
                raise ValueError(f"only names layers, write layers | {self}")
        return self

    def __str__(self) -> str:
        return " | ".join(map(str, self.stages))

    __repr__ = __str__

    def full(self) -> str:
        return " | ".join(stage.full() for stage in self.stages)

    def chained(self) -> tuple[Codec, ...]:
        return self.stages

    def allot(self, links: Links, size: int) -> Tensor | None:
        shares = (stage.allot(links, size) for stage in self.stages)
        return next((share for share in shares if share is not None), None)

    @property
    def short_name(self) -> str:
        return "_".join(stage.short_name for stage in self.stages)

    # ---- what it is made of

    @property
    def sparse(self) -> bool:
        return any(stage.place == Select.place for stage in self.stages)

    @cached_property
    def _transforms(self) -> list[Transform]:
        return [stage for stage in self.stages if isinstance(stage, Transform)]

    @cached_property
    def _coder(self) -> Coder:
        from hanse.codecs.coders import packed

        return next((stage for stage in self.stages if isinstance(stage, Coder)), packed())

    @cached_property
    def _squeeze(self) -> Squeeze | None:
        return next((stage for stage in self.stages if isinstance(stage, Squeeze)), None)

    def _pieces(self, layout: Layout) -> list[tuple[str, tuple[int, ...], slice]]:
        """Name, shape and place of what is coded by itself."""
        if isinstance(self.stages[0], layers):
            for stage in self.stages if len(layout.entries) > 1 else ():
                for pattern in stage.patterns:
                    if not any(fnmatchcase(e.name, pattern) for e in layout.entries):
                        there = ", ".join(e.name for e in layout.entries)
                        raise ConfigError(f"{stage.short_name}.only: {pattern!r} matches no layer; there are: {there}")
            return [(e.name, e.shape, slice(e.start, e.start + e.size)) for e in layout.entries]
        return [("", (layout.size,), slice(0, layout.size))]

    # ---- there

    def encode(self, x: Tensor, sending: Sending | None = None) -> bytes:
        sending = sending or Sending.of(x)
        pieces = [self._forward(x[None, where], name, shape, sending) for name, shape, where in self._pieces(sending.layout)]
        body = [part for piece in pieces for part in self._write(*piece, 0)]
        squeeze = self._squeeze
        return frame(x, body if squeeze is None else [squeeze.squeeze(b"".join(body))])

    def roundtrip(self, rows: Tensor, sending: Sending) -> Sent:
        clients = len(rows)
        sizes, squeeze = torch.full((clients,), FRAME.size), self._squeeze
        values, kept = torch.empty_like(rows), torch.ones_like(rows, dtype=torch.bool) if sending.masks else None
        bodies: list[list[Buffer]] = [[] for _ in range(clients)] if squeeze is not None else []
        for name, shape, where in self._pieces(sending.layout):
            here = rows[:, where]
            load, codable, _ = piece = self._forward(here, name, shape, sending)
            values[:, where] = self._arrived(load, here, codable)
            if kept is not None and (places := self._places(load)) is not None:
                chosen = kept.new_zeros(clients, load.size + 1).scatter_(1, places, True)[:, :-1]
                kept[:, where] = chosen | ~codable[:, None]
            if squeeze is None:
                sizes += self._sizes(*piece)
            else:
                for i, body in enumerate(bodies):
                    body += self._write(*piece, i)
        if squeeze is not None:
            sizes += torch.tensor([len(squeeze.squeeze(b"".join(body))) for body in bodies], dtype=torch.int64)
        return Sent(values, sizes, kept)

    def _forward(self, rows: Tensor, name: str, shape: tuple[int, ...], sending: Sending) -> tuple[Load, Tensor, Tensor]:
        """What clients send of one layer ``[C, n]``, which of them have finite numbers to send, bool ``[C]``, and the layer."""
        values = rows if rows.dtype == torch.float64 else rows.float()
        first = next(iter(self._transforms), None)
        codable = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        if first is None or not first.tells:
            codable = _finite(values)
            if not bool(codable.all()):
                values = torch.where(codable[:, None], values, 0)
        load = Load(name, shape, rows.shape[1], values)
        for stage in self._transforms:
            load = stage.forward(load, sending)
        numbers = [load.table] if load.symbols is not None else [load.table, load.values.to(self._sent_as(rows.dtype))]
        for part in numbers:
            if part is not None:  # a scale may overflow, and so may a shorter type
                codable = codable & _finite(part)
        return load, codable, rows

    def _places(self, load: Load) -> Tensor | None:
        """Which entries are sent."""
        return next((stage.places(load) for stage in self.stages if isinstance(stage, Select)), None)

    def _sent_as(self, dtype: torch.dtype) -> torch.dtype:
        for stage in self._transforms:
            dtype = stage.sent_as(dtype)
        return dtype

    def _sizes(self, load: Load, codable: Tensor, rows: Tensor) -> Tensor:
        """Bytes of one layer, int64 ``[C]``."""
        count = load.lengths.cpu()
        size = varint_size(count + 1) + self._coder.sizes(load)
        if load.seeds is not None:
            size += 8
        if load.table is not None:
            columns = {n: self._columns(n) for n in set(count.tolist())}
            size += torch.tensor([columns[n] for n in count.tolist()]) * load.table.dtype.itemsize
        if load.symbols is None:
            size += count * self._sent_as(rows.dtype).itemsize
        return torch.where(codable.cpu(), size, 1 + rows.shape[1] * rows.dtype.itemsize)

    def _columns(self, count: int) -> int:
        return sum(stage.columns(count) for stage in self._transforms)

    def _write(self, load: Load, codable: Tensor, rows: Tensor, i: int) -> list[Buffer]:
        """One client's layer, in pieces."""
        if not bool(codable[i]):
            return [varint(0), raw(rows[i])]
        n = int(load.lengths[i])
        places, symbols = (None if t is None else t[i, :n].cpu() for t in (load.places, load.symbols))
        parts: list[Buffer] = [varint(n + 1)]
        if load.seeds is not None:
            parts.append(raw(load.seeds[i : i + 1]))
        if load.table is not None:
            parts.append(raw(load.table[i, : self._columns(n)]))
        parts += self._coder.write(load.size, places, symbols, load.levels)
        if symbols is None:
            parts.append(raw(load.values[i, :n].to(self._sent_as(rows.dtype))))
        return parts

    # ---- and back

    def _arrived(self, load: Load, rows: Tensor, codable: Tensor) -> Tensor:
        """What the receiver makes of it, ``[C, n]``."""
        if load.symbols is None:  # what a shorter type has left of them
            load = replace(load, values=load.values.to(self._sent_as(rows.dtype)).to(load.values.dtype))
        values = self._received(load, rows.dtype)
        return values if bool(codable.all()) else torch.where(codable[:, None], values, rows)

    def _received(self, load: Load, dtype: torch.dtype) -> Tensor:
        """Values ``[C, n]`` of what was sent."""
        for stage in reversed(self._transforms):
            load = stage.backward(load)
        return load.values.to(dtype)

    def decode(self, data: bytes, layout: Layout | None = None) -> Tensor:
        n, dtype, reader = unframe(data, None if layout is None else layout.size)
        pieces = self._pieces(layout or Layout({"": (n,)}))
        squeeze = self._squeeze
        if squeeze is not None:
            most = 64 * n + 8 * SMALL * len(pieces)
            reader = Reader(squeeze.restore(bytes(reader.take(reader.left)), most))
        found = [self._read(reader, name, shape, dtype) for name, shape, _ in pieces]
        reader.end()
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read(self, reader: Reader, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One client's layer ``[n]``."""
        size, most = math.prod(shape), math.prod(shape)
        for stage in self._transforms:
            most = stage.most((most,) if stage.place > 1 else shape)
        count = reader.varint(most + 1) - 1
        if count < 0:
            if not all(stage.bare for stage in self._transforms):
                raise CodecError(f"layer {name!r}: it may not travel as it is")
            return reader.array(dtype, size)
        if count != most and not any(stage.ragged for stage in self._transforms):
            raise CodecError(f"layer {name!r}: {count} entries, expected {most}")
        work = torch.float64 if dtype == torch.float64 else torch.float32
        placed, drawn = (any(getattr(stage, flag) for stage in self._transforms) for flag in ("placed", "drawn"))
        levels, columns = max((stage.levels for stage in self._transforms), default=0), self._columns(count)
        seeds = reader.array(torch.int64, 1) if drawn else None
        table = reader.array(work, columns)[None] if levels else None
        places, symbols = self._coder.read(reader, size, count, placed, levels)
        values = reader.array(self._sent_as(dtype), count).to(work) if not levels else torch.zeros(1, dtype=work).expand(count)
        load = Load(
            name=name,
            shape=shape,
            size=size,
            values=values[None],
            places=None if places is None else places[None],
            symbols=None if symbols is None else symbols[None],
            levels=levels,
            table=table,
            seeds=seeds,
        )
        return self._received(load, dtype)[0]


def _finite(x: Tensor) -> Tensor:
    """Which rows hold only finite numbers, bool ``[C]``."""
    sums = torch.isfinite(x.sum(1))  # one pass; a finite row of huge numbers is looked at again
    return sums if bool(sums.all()) else torch.isfinite(x).all(1)
