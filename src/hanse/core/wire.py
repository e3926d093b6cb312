"""Named tensors as a safetensors file, without copies: into memory, out of it, or as the pieces of a stream.

The format is that of the library of that name (8 bytes of length, a JSON header, the data by type and name), whose functions make
bytes of tensors and tensors of bytes; here the data stay where they are. So the size of a message is a function of names, types
and shapes alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hanse.core.errors import CodecError

Tensors = dict[str, Tensor]

_DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_PLACE = {dtype: place for place, dtype in enumerate(_DTYPES)}  # safetensors lays tensors out by type in this order, then by name
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}

Spec = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
"""Name, type and shape of every tensor."""
About = Mapping[str, str]
"""What a message says in words, beside its tensors."""

ABOUT = "__metadata__"
LONGEST_HEADER = 16 << 20
"""Bytes of the longest header that is read."""


def _spec(tensors: Mapping[str, Tensor]) -> Spec:
    return tuple((n, t.dtype, tuple(t.shape)) for n, t in tensors.items())


@lru_cache(maxsize=4096)
def _laid_out(spec: Spec, about: tuple[tuple[str, str], ...]) -> tuple[bytes, tuple[tuple[str, int, int], ...]]:
    """The header, and where each tensor's data begin and end, counted from the start of the message."""
    header: dict[str, Any] = {ABOUT: dict(about)} if about else {}
    places, end = [], 0
    for name, dtype, shape in sorted(spec, key=lambda s: (_PLACE[s[1]], s[0])):
        start, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        places.append((name, start, end))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, tuple((name, begin + start, begin + stop) for name, start, stop in places)


def wire_size(tensors: Mapping[str, Tensor], coded: Mapping[str, int] | None = None, about: About | None = None) -> int:
    """Bytes of the safetensors file that holds ``tensors``; equal to ``len(safetensors.torch.save(tensors, about))``.

    ``coded`` adds arrays of encoded bytes of the given lengths.
    """
    arrays = tuple((n, torch.uint8, (size,)) for n, size in coded.items()) if coded else ()
    header, places = _laid_out(_spec(tensors) + arrays, tuple((about or {}).items()))
    return places[-1][2] if places else len(header)


def nested(groups: Mapping[str, Mapping[str, Tensor]]) -> Tensors:
    """Groups of tensors as one, by names like ``group.name``."""
    return {f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()}


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """The groups of ``nested``: by what stands before the first dot of a name, in the order in which they come."""
    found: dict[str, Tensors] = {}
    for name, t in tensors.items():
        group, _, rest = name.partition(".")
        found.setdefault(group, {})[rest] = t
    return found


def write(memory: Tensor, tensors: Mapping[str, Tensor], about: About | None = None) -> int:
    """Lay ``tensors`` out in ``memory`` (uint8, at least ``wire_size`` long); the bytes used."""
    header, places = _laid_out(_spec(tensors), tuple((about or {}).items()))
    memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for name, start, end in places:
        if end > start:
            t = tensors[name]
            memory[start:end].view(t.dtype).view(t.shape).copy_(t)
    return places[-1][2] if places else len(header)


def pieces(tensors: Mapping[str, Tensor], about: About | None = None) -> Iterator[memoryview]:
    """The message piece by piece: its header, then the memory of one tensor after the other, a copy only where it is scattered."""
    header, places = _laid_out(_spec(tensors), tuple((about or {}).items()))
    yield memoryview(header)
    for name, start, end in places:
        if end > start:
            yield tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def read(memory: Tensor | bytes) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a message, as views of its ``memory`` (of bytes: of one copy), and what it says beside them.

    Raises ``CodecError`` unless it is one whole message and nothing else.
    """
    if not isinstance(memory, Tensor):
        memory = torch.frombuffer(bytearray(memory), dtype=torch.uint8) if memory else torch.empty(0, dtype=torch.uint8)
    try:
        return _read(memory)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError, OverflowError) as error:
        raise CodecError(f"not a message: {error}") from None


def _read(memory: Tensor) -> tuple[Tensors, dict[str, str]]:
    length = int.from_bytes(bytes(memory[:8].tolist()), "little")
    begin = 8 + length
    if len(memory) < 8 or length > LONGEST_HEADER or begin > len(memory):
        raise ValueError(f"{len(memory)} bytes, with a header of {length}")
    header = json.loads(memory[8:begin].numpy().tobytes())
    about = header.pop(ABOUT, {})
    if not all(isinstance(text, str) for text in about.values()):
        raise TypeError(f"{ABOUT} holds something else than text")
    found, expected = Tensors(), 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, end) = _NAMES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
            raise ValueError(f"{name!r} is of shape {shape} at {start} to {end}")
        size = dtype.itemsize
        for n in shape:
            size *= n
        if start != expected or end - start != size or begin + end > len(memory) or start % dtype.itemsize:
            raise ValueError(f"{name!r} lies at {start} to {end}")
        expected = end
        whole = memory[begin + start : begin + end]
        found[name] = whole.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    if begin + expected != len(memory):
        raise ValueError(f"{len(memory) - begin - expected} bytes too many")
    return found, about
