"""What travels: named tensors, and the declaration of what the server may see.

On any wire or disk a message is a safetensors file, so its size is a function of names, types and shapes alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

_DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_PLACE = {dtype: place for place, dtype in enumerate(_DTYPES)}  # safetensors lays tensors out by type in this order, then by name


def wire_size(tensors: Mapping[str, Tensor], coded: Mapping[str, int] | None = None) -> int:
    """Bytes of the safetensors file that holds ``tensors``; equal to ``len(safetensors.torch.save(tensors))``.

    ``coded`` adds arrays of encoded bytes of the given lengths.
    """
    arrays = tuple((n, torch.uint8, (size,)) for n, size in coded.items()) if coded else ()
    return _size(tuple((n, t.dtype, tuple(t.shape)) for n, t in tensors.items()) + arrays)


@lru_cache(maxsize=4096)
def _size(spec: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> int:
    header, end = {}, 0
    for name, dtype, shape in sorted(spec, key=lambda s: (_PLACE[s[1]], s[0])):
        start, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + text + -text % 8 + end


@dataclass
class Upload:
    """What a batch of clients sends, axis 0 = client.

    ``sums`` are only ever used through ``sum_i weight_i v_i`` (so they may be added in a tree, in chunks, under secure aggregation
    or with noise); one without a client axis has been added to the running totals already. ``rows`` are seen one by one.
    ``loss`` ``[C]`` is each client's mean training loss.
    """

    clients: Tensor
    weight: Tensor
    sums: Tensors
    rows: Tensors
    loss: Tensor


@dataclass
class Reply:
    """What the server sees of some clients: ``sums[name] = sum_i weight_i v_i``, and ``rows[name]`` ``[C, ...]``.

    ``loss`` ``[C]`` is each client's mean training loss; ``version`` is the round of the model they started from,
    ``population`` the number N of registered clients.
    """

    clients: Tensor
    weight: Tensor
    sums: Tensors
    rows: Tensors
    loss: Tensor
    population: int
    version: int = 0

    def __len__(self) -> int:
        return len(self.clients)

    def mean(self, name: str) -> Tensor:
        """``sum_i weight_i v_i / sum_i weight_i``."""
        return self.sums[name] / self.weight.sum()
