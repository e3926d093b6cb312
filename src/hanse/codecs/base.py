"""What every codec is: a vector to bytes and back."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hanse.core.errors import CodecError
from hanse.core.part import Part


class Codec(Part):
    """Base of all codecs. ``decode(encode(x))`` equals a row of ``roundtrip`` bit for bit, with the same number of bytes.

    A codec changes what the server receives, not what a client remembers of what it sent.
    """

    kind: ClassVar[str] = "codec"
    abstract: ClassVar[bool] = True
    plain: ClassVar[bool] = False
    """Whether tensors travel as they are."""

    def encode(self, x: Tensor) -> bytes:
        """A vector ``[P]`` as bytes."""
        raise TypeError(f"{type(self).__name__} does not define encode")

    def decode(self, data: bytes) -> Tensor:
        """Bytes back to a vector; raises ``CodecError`` on anything that ``encode`` did not make."""
        raise TypeError(f"{type(self).__name__} does not define decode")

    def roundtrip(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``[C, P]`` to what arrives, ``[C, P]``, and the bytes of each row, int64 ``[C]``; may change ``rows``."""
        coded = [self.encode(row) for row in rows]
        return torch.stack([self.decode(data) for data in coded]).to(rows.device), torch.tensor([len(data) for data in coded])


class identity(Codec):
    """The tensors as they are: message bytes are those of the safetensors file."""

    plain: ClassVar[bool] = True

    def encode(self, x: Tensor) -> bytes:
        from safetensors.torch import save

        return save({"x": x.contiguous()})

    def decode(self, data: bytes) -> Tensor:
        x = read(data, ("x",))["x"]
        if x.dim() != 1:
            raise CodecError(f"identity: got shape {tuple(x.shape)}, expected a vector")
        return x


def read(data: bytes, names: tuple[str, ...]) -> dict[str, Tensor]:
    """A safetensors file with exactly the given names; raises ``CodecError`` otherwise."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CodecError(f"not a valid encoding: {error}") from None
    if set(tensors) != set(names):
        raise CodecError(f"not a valid encoding: found {sorted(tensors)}, expected {sorted(names)}")
    return tensors
