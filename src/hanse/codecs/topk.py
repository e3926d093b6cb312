"""Top-k sparsification: send the entries of largest magnitude and their places."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hanse.codecs.base import Codec, read
from hanse.core.errors import CodecError
from hanse.core.messages import wire_size


class topk(Codec):
    """Keep the ``fraction`` of entries of largest magnitude (at least one), as int32 places and float values."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of entries kept."""

    def _kept(self, size: int) -> int:
        return max(1, round(self.fraction * size)) if size else 0

    def encode(self, x: Tensor) -> bytes:
        from safetensors.torch import save

        place = torch.topk(x.abs(), self._kept(len(x)), sorted=False).indices.sort().values
        return save({"place": place.int(), "value": x[place].contiguous(), "size": torch.tensor([len(x)])})

    def decode(self, data: bytes) -> Tensor:
        parts = read(data, ("place", "value", "size"))
        place, value, size = parts["place"], parts["value"], parts["size"]
        if (
            place.dtype != torch.int32
            or size.dtype != torch.int64
            or size.shape != (1,)
            or place.shape != value.shape
            or place.dim() != 1
        ):
            raise CodecError("topk: places, values and size do not fit together")
        n = int(size)
        rising = bool((place.diff() > 0).all())
        if len(place) != self._kept(n) or not rising or (len(place) and not 0 <= int(place[0]) <= int(place[-1]) < n):
            raise CodecError(f"topk: {len(place)} places do not fit {n} entries at fraction {self.fraction}, or are not in order")
        return torch.zeros(n, dtype=value.dtype).index_copy_(0, place.long(), value)

    def roundtrip(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        clients, size = rows.shape
        place = torch.topk(rows.abs(), self._kept(size), dim=1, sorted=False).indices
        sent = torch.zeros_like(rows).scatter_(1, place, rows.gather(1, place))
        one = {
            "place": place[0].int(),
            "value": torch.empty(place.shape[1], dtype=rows.dtype, device="meta"),
            "size": torch.empty(1, dtype=torch.int64, device="meta"),
        }
        return sent, torch.full((clients,), wire_size(one))
