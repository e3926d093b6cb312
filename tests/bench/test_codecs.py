"""The ways that codecs are compared with, and the table."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hanse.bench import codecs
from hanse.codecs import Codec

BOUND = {
    "numpy, argpartition top-k 1 %": (49.5, 0.97),
    "numpy, min/max uint8": (3.9, 0.02),
    "torch.quantize_per_tensor, 8 bits": (3.7, 0.02),
    "torch.save": (0.95, 0.0),
    "zstd on float32": (1.0, 0.0),
}


@pytest.mark.parametrize("name", BOUND)
def test_every_way_gives_back_what_it_says(name: str) -> None:
    """At least so many times shorter, at most so wrong."""
    found = codecs.measure(name, 100_000, repeats=1)
    ratio, error = BOUND[name]
    assert 400_000 / found["bytes"] >= ratio and found["error"] <= error and min(found["encode_s"], found["decode_s"]) > 0


def test_numpys_obvious_ways_do_what_the_codecs_do() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    for name, text in (("numpy, argpartition top-k 1 %", "topk(0.01)"), ("numpy, min/max uint8", "uniform(8)")):
        encode, decode = codecs.way(name)
        mine = Codec.parse(text)
        torch.testing.assert_close(torch.as_tensor(decode(encode(x))), mine.decode(mine.encode(x)), rtol=0, atol=2e-6)


def test_the_table_has_the_best_of_all_repetitions() -> None:
    asked: list[tuple[str, int]] = []

    def one(command: list[str]) -> dict[str, Any]:
        spec = json.loads(command[-1])
        asked.append((spec["name"], spec["size"]))
        first = len(asked) <= 2 * len(codecs.names())
        times = {"encode_s": 2.0 if first else 1.0, "decode_s": 3.0 if first else 4.0}
        return {"case": spec["name"], "size": spec["size"], "bytes": spec["size"], "error": 0.5, **times}

    table = codecs.rows(2, one, sizes=(1000, 2000))
    assert len(table) == 2 * len(codecs.names()) and len(asked) == 2 * len(table) == 2 * len(set(asked))
    for row in table:
        speed = 4e-9 * row["size"]
        assert (row["ratio"], row["encode_gb_s"], row["decode_gb_s"]) == pytest.approx((4, speed, speed / 3))


def test_all_chains_are_codecs() -> None:
    assert all(str(Codec.parse(text)) for text in codecs.CHAINS)
