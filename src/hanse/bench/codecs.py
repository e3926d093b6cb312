"""Codecs side by side: how much shorter, how wrong, how fast.

Each way runs in a process of its own and in turn with the others; times are the least of several, in GB of float32 a second.
"""

from __future__ import annotations

import io
import json
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanse.codecs import Codec
from hanse.core.streams import Streams

SIZES = (1_000_000, 25_000_000)
CHAINS = (
    "topk(0.01)",
    "topk(0.01) | gaps",
    "topk(0.01) | uniform(8) | golomb",
    "topk(0.1) | kmeans(2) | shortest",
    "uniform(8)",
    "int8",
    "uniform(4)",
    "sign",
    "cast",
)
Way = tuple[Callable[[Tensor], bytes], Callable[[bytes], Any]]


def numpy_topk(fraction: float = 0.01) -> Way:
    """Places and values by ``argpartition``."""

    def encode(x: Tensor) -> bytes:
        row = x.numpy()
        k = int(fraction * len(row))
        at = np.argpartition(np.abs(row), len(row) - k)[len(row) - k :]
        return len(row).to_bytes(8, "little") + at.astype(np.int32).tobytes() + row[at].tobytes()

    def decode(data: bytes) -> Any:
        k = (len(data) - 8) // 8
        row = np.zeros(int.from_bytes(data[:8], "little"), np.float32)
        row[np.frombuffer(data, np.int32, k, 8)] = np.frombuffer(data, np.float32, k, 8 + 4 * k)
        return row

    return encode, decode


def numpy_uint8() -> Way:
    """256 levels from the smallest to the largest number."""

    def encode(x: Tensor) -> bytes:
        row = x.numpy()
        low, step = row.min(), (row.max() - row.min()) / np.float32(255)
        found: bytes = np.array([low, step]).tobytes() + np.round((row - low) / step).astype(np.uint8).tobytes()
        return found

    def decode(data: bytes) -> Any:
        low, step = np.frombuffer(data, np.float32, 2)
        return np.frombuffer(data, np.uint8, offset=8) * step + low

    return encode, decode


def torch_quantised() -> Way:
    """``torch.quantize_per_tensor`` to 8 bits, in the file that ``torch.save`` makes."""

    def encode(x: Tensor) -> bytes:
        low, high = x.aminmax()
        step = float(high - low) / 255
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, with no successor in torch itself
            torch.save(torch.quantize_per_tensor(x, step, round(-float(low) / step), torch.quint8), file)
        return file.getvalue()

    return encode, lambda data: torch.load(io.BytesIO(data), weights_only=True).dequantize()


def torch_saved() -> Way:
    """The numbers as they are, in the file that ``torch.save`` makes."""

    def encode(x: Tensor) -> bytes:
        file = io.BytesIO()
        torch.save(x, file)
        return file.getvalue()

    return encode, lambda data: torch.load(io.BytesIO(data), weights_only=True)


def zstd_alone() -> Way:
    """Zstandard over the numbers as they are."""
    import zstandard

    return (
        lambda x: bytes(zstandard.ZstdCompressor(level=3).compress(memoryview(x.numpy()).cast("B"))),
        lambda data: np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.float32),
    )


def flower() -> Way:
    """What Flower sends: an array in NumPy's format."""
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.common.typing import Parameters

    def encode(x: Tensor) -> bytes:
        found: bytes = ndarrays_to_parameters([x.numpy()]).tensors[0]
        return found

    return encode, lambda data: parameters_to_ndarrays(Parameters([data], "numpy.ndarray"))[0]


PEERS: dict[str, Callable[[], Way]] = {
    "numpy, argpartition top-k 1 %": numpy_topk,
    "numpy, min/max uint8": numpy_uint8,
    "torch.quantize_per_tensor, 8 bits": torch_quantised,
    "torch.save": torch_saved,
    "zstd on float32": zstd_alone,
    "Flower, parameters": flower,
}


def names() -> list[str]:
    """All ways that can run here."""
    return [*CHAINS, *(name for name in PEERS if name != "Flower, parameters" or find_spec("flwr"))]


def way(name: str) -> Way:
    """To bytes and back."""
    if name in PEERS:
        return PEERS[name]()
    codec = Codec.parse(name)
    return codec.encode, codec.decode


def measure(name: str, size: int, repeats: int = 5) -> dict[str, Any]:
    """Ratio, relative error and seconds of one way, for ``size`` normal numbers."""
    encode, decode = way(name)
    x = torch.randn(size, generator=Streams(0).torch("workload"))
    spent: list[tuple[float, float]] = []
    for _ in range(repeats):
        times = [time.perf_counter()]
        data = encode(x)
        times.append(time.perf_counter())
        got = decode(data)
        times.append(time.perf_counter())
        spent.append((times[1] - times[0], times[2] - times[1]))
    error = float(np.linalg.norm(np.asarray(got) - x.numpy()) / np.linalg.norm(x.numpy()))
    encoding, decoding = (min(column) for column in zip(*spent, strict=True))
    return {"case": name, "size": size, "bytes": len(data), "error": error, "encode_s": encoding, "decode_s": decoding}


HEADERS = "codec", "numbers", "times shorter", "relative error", "GB/s to bytes", "GB/s back"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row for people."""
    speeds = f"{row['encode_gb_s']:.2f}", f"{row['decode_gb_s']:.2f}"
    return row["case"], f"{row['size']:,}", f"{row['ratio']:.2f}", f"{row['error']:.4f}", *speeds


def rows(repeats: int, one: Callable[[list[str]], dict[str, Any]], sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """One row for each way and size; ``one`` runs a command and gives the last line of its output."""
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for _ in range(repeats):
        for size in sizes:
            for name in names():
                found = one([sys.executable, "-m", "hanse.bench.codecs", json.dumps({"name": name, "size": size})])
                before = best.setdefault((size, name), found)
                before |= {key: min(before[key], found[key]) for key in ("encode_s", "decode_s")}
    return [
        {
            **row,
            "ratio": 4 * row["size"] / row["bytes"],
            "encode_gb_s": 4e-9 * row["size"] / row["encode_s"],
            "decode_gb_s": 4e-9 * row["size"] / row["decode_s"],
        }
        for row in best.values()
    ]


if __name__ == "__main__":
    from hanse.engines.execution import keep_freed_memory

    keep_freed_memory()
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
