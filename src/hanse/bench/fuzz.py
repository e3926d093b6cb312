"""Damaged messages: ``python -m hanse.bench.fuzz 1000000`` feeds so many to decoders; each is refused, or gives a vector.

Prints a JSON line: how many were refused (``CodecError``) and how many gave a vector of the right size. Anything else is an error,
and the status is 1.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from hanse.codecs import Codec, Sending
from hanse.core.errors import CodecError
from hanse.core.layout import Layout
from hanse.core.streams import Streams

LAYOUT = Layout({"a.weight": (12, 10), "a.bias": (12,), "one": (), "none": (0, 3), "b.weight": (5, 12)})
CHAINS = (
    "identity",
    "topk(0.1)",
    "layers | topk(0.2) | kmeans(2) | shortest",
    "topk(0.1) | uniform(3) | golomb",
    "threshold(1) | sign | elias(grouped=True)",
    "topk(0.3) | nf4 | bitmap(grouped=True)",
    "topk(0.2) | ternary | positions",
    "layers | threshold(1) | int8(8) | gaps(grouped=True)",
    "kmeans(5) | huffman",
    "layers | topk(0.5) | uniform(8) | huffman",
    "randomk(0.1) | int8(7)",
    "layers | lowrank(2) | uniform(4) | zstd",
    "projections(5) | cast('float16')",
    "layers | ranks",
    "feedback(topk(0.1) | uniform(8) | zstd)",
)


def messages(codec: Codec) -> list[bytes]:
    """Some that a sender makes."""
    generator = Streams(0).torch("fuzz")
    ranked = torch.cat([torch.randperm(n, generator=generator) for n in LAYOUT.sizes]).float()
    normal = torch.randn(LAYOUT.size, generator=generator)
    rows = [ranked] if "ranks" in str(codec) else [ranked, normal, normal / 0]
    return [codec.encode(x, Sending.of(x, LAYOUT, seed)) for seed, x in enumerate(rows)]


def mutated(whole: list[bytes], chance: np.random.Generator) -> Iterator[bytes]:
    """Some bytes changed, a piece cut out, put in, or taken from elsewhere; three of four have a checksum that fits."""
    while True:
        data = bytearray(whole[int(chance.integers(len(whole)))])
        for _ in range(int(chance.integers(1, 4))):
            at, length, kind = int(chance.integers(len(data) + 1)), int(chance.geometric(0.3)), int(chance.integers(5))
            if kind < 2 and at < len(data):
                data[at] = int(chance.integers(256)) if kind else data[at] ^ 1 << int(chance.integers(8))
            elif kind == 2:
                del data[at : at + length]
            elif kind == 3:
                data[at:at] = chance.bytes(length)
            else:
                start = int(chance.integers(len(data) + 1))
                data[at : at + length] = data[start : start + length]
        if len(data) >= 16 and whole[0][:2] == b"hz" and chance.integers(4):
            data[:4] = whole[0][:4]
            data[4:8] = zlib.crc32(data[8:], zlib.crc32(data[:4])).to_bytes(4, "little")
        yield bytes(data)


def fuzz(text: str, count: int, seed: int) -> tuple[int, int]:
    """How many of ``count`` damaged messages were refused, and how many gave a vector."""
    torch.set_num_threads(1)
    codec = Codec.parse(text)
    source, refused, given = mutated(messages(codec), Streams(seed).numpy(text)), 0, 0
    for _ in range(count):
        data = next(source)
        try:
            found = codec.decode(data, LAYOUT)
        except CodecError:
            refused += 1
        except BaseException as error:
            raise RuntimeError(f"{text}: {type(error).__name__}: {error}; the message is {data.hex()}") from error
        else:
            if found.shape != (LAYOUT.size,):
                raise RuntimeError(f"{text}: a vector of {tuple(found.shape)}; the message is {data.hex()}")
            given += 1
    return refused, given


def run(count: int, processes: int, seed: int = 0) -> dict[str, dict[str, int]]:
    """By chain: messages refused and vectors given."""
    share, lots = 2_000, -(-count // (2_000 * len(CHAINS)))
    jobs = [(text, share, seed + lot) for lot in range(lots) for text in CHAINS]
    total = {text: {"refused": 0, "given": 0} for text in CHAINS}
    with ProcessPoolExecutor(processes) as pool:
        for (text, _, _), (refused, given) in zip(jobs, pool.map(fuzz, *zip(*jobs, strict=True)), strict=True):
            total[text]["refused"] += refused
            total[text]["given"] += given
    return total


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, os.cpu_count() or 1)))
