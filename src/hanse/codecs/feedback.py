"""Error feedback: what a message could not carry is added to the next one."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor

from hanse.codecs.base import Codec, Links, Sending, Sent
from hanse.core.layout import Layout


class feedback(Codec):
    """``codec`` of the vector plus what was left over, of which what the codec leaves is kept for the next time.

        sent = C(x + e);   e <- x + e - sent

    Stich, Cordonnier, Jaggi: "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599, Algorithm 1; Karimireddy et al., arXiv
    1901.09847, Algorithm 2. Each client keeps a row e for every name it sends.
    """

    codec: Codec
    """What loses something, and does not make up for it by itself."""
    keeps: ClassVar[tuple[str, ...]] = ("residual",)

    @model_validator(mode="after")
    def _not_twice(self) -> feedback:
        if self.codec.corrects:
            raise ValueError("unbiased scales up what is sent, which the next message would take back: leave it out")
        return self

    def encode(self, x: Tensor, sending: Sending | None = None) -> bytes:
        sending = sending or Sending.of(x)
        wanted = x + sending.memory["residual"][0] if "residual" in sending.memory else x
        data = self.codec.encode(wanted, replace(sending, memory={}))
        left = wanted - self.codec.decode(data, sending.layout)
        sending.memory["residual"] = torch.where(torch.isfinite(left), left, 0)[None]
        return data

    def allot(self, links: Links, size: int) -> Tensor | None:
        return self.codec.allot(links, size)

    @property
    def sparse(self) -> bool:
        return self.codec.sparse

    def decode(self, data: bytes, layout: Layout | None = None) -> Tensor:
        return self.codec.decode(data, layout)

    def roundtrip(self, rows: Tensor, sending: Sending) -> Sent:
        wanted = rows + sending.memory["residual"] if "residual" in sending.memory else rows
        sent = self.codec.roundtrip(wanted.clone(), replace(sending, memory={}))
        left = wanted - sent.values
        sending.memory["residual"] = torch.where(torch.isfinite(left), left, 0)
        return sent
