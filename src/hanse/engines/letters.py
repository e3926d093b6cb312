"""What one client and the server send each other, as the bytes that the simulation counts.

A letter is a message of named tensors (``core/wire.py``); vectors that a codec writes are arrays of its bytes. What has to be known
to read it and is no part of those bytes is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hanse.codecs.base import Codec
from hanse.core.errors import CodecError
from hanse.core.layout import Layout
from hanse.core.messages import Tensors, Upload
from hanse.core.wire import pieces, read
from hanse.engines.execution import Executor, Trained, as_is, memory_key

Layouts = Callable[[str, int], Layout]


def as_bytes(tensors: Tensors) -> bytes:
    """A letter as it travels."""
    return b"".join(pieces(tensors))


def array(data: bytes) -> Tensor:
    """A codec's bytes as a tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def opened(data: bytes, coded: Mapping[str, int], codec: Codec, layout_of: Layouts) -> Tensors:
    """The message in a letter from the server, in which ``codec`` has written those vectors ``coded`` gives the size of."""
    tensors, _ = read(data)
    for name, size in coded.items():
        tensors[name] = codec.decode(tensors[name].numpy().tobytes(), layout_of(name, size))
    return tensors


def upload_letter(executor: Executor, trained: Trained) -> Tensors:
    """What one client sends; what its codec keeps goes to what it keeps."""
    upload, codec, state = trained.upload, executor.codec, trained.state
    letter = {"weight": upload.weight[:1], "loss": upload.loss[:1]}
    for name, values in {**upload.sums, **upload.rows}.items():
        if name in upload.senders and not bool(upload.senders[name][0]):
            continue
        if codec.plain or as_is(name, values.dtype):
            letter[name] = values[0]
            continue
        how = executor.sending(trained.orders, state, name, values.shape[1])
        letter[name] = array(codec.encode(values[0].clone(), how))
        state |= {memory_key(name, row): rows for row, rows in how.memory.items()}
    return letter


class Expected(NamedTuple):
    """A tensor that clients send: whether only sums of it are needed, its shape, its type, and whether some do not send it."""

    sums: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    optional: bool


def expectations(upload: Upload) -> dict[str, Expected]:
    """What replies are to look like, after one client's work."""
    found = {}
    for sums, group in ((True, upload.sums), (False, upload.rows)):
        for name, values in group.items():
            found[name] = Expected(sums, tuple(values.shape[1:]), values.dtype, name in upload.senders)
    return found


def upload_in(data: bytes, client: int, expected: Mapping[str, Expected], like: Tensor, codec: Codec, layout_of: Layouts) -> Upload:
    """The upload in a client's letter. ``like`` is of the weights' type and place.

    Raises ``CodecError`` where it is not what is ``expected``: other names, types or shapes, numbers that are not finite, a
    negative weight.
    """
    tensors, _ = read(data)
    missing = [n for n, e in expected.items() if not e.optional and n not in tensors]
    if missing or tensors.keys() - expected.keys() != {"weight", "loss"}:
        raise CodecError(f"got {', '.join(sorted(tensors))}; expected {', '.join(sorted({*expected, 'weight', 'loss'}))}")
    upload = Upload(torch.tensor([client]), tensors["weight"], {}, {}, {}, tensors["loss"])
    for name in ("weight", "loss"):
        if tensors[name].shape != (1,) or tensors[name].dtype != like.dtype or not bool(tensors[name].isfinite()):
            raise CodecError(f"{name}: not one finite number of type {like.dtype}")
    if float(upload.weight) < 0:
        raise CodecError(f"weight: {float(upload.weight)} is not allowed: at least 0")
    for name, wanted in expected.items():
        values = torch.zeros(wanted.shape, dtype=wanted.dtype)
        if name in tensors:
            values = _vector(name, tensors[name], wanted, codec, layout_of)
        (upload.sums if wanted.sums else upload.rows)[name] = values.to(like.device)[None]
        if wanted.optional:
            upload.senders[name] = torch.tensor([name in tensors])
    upload.weight, upload.loss = upload.weight.to(like.device), upload.loss.to(like)
    return upload


def _vector(name: str, sent: Tensor, wanted: Expected, codec: Codec, layout_of: Layouts) -> Tensor:
    if not codec.plain and not as_is(name, wanted.dtype):
        if sent.dtype != torch.uint8 or sent.dim() != 1:
            raise CodecError(f"{name}: not written by {codec}")
        sent = codec.decode(sent.numpy().tobytes(), layout_of(name, wanted.shape[0]))
    if tuple(sent.shape) != wanted.shape or sent.dtype != wanted.dtype:
        raise CodecError(f"{name}: {sent.dtype} {tuple(sent.shape)} instead of {wanted.dtype} {wanted.shape}")
    if not bool(sent.isfinite().all()) or (sent.is_floating_point() and not bool(sent.norm().isfinite())):
        raise CodecError(f"{name}: not finite, or so large that its norm is not")
    return sent
