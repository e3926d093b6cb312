"""Damaged messages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hanse.bench import fuzz
from hanse.codecs import Codec, topk


@pytest.mark.parametrize("text", fuzz.CHAINS)
def test_damaged_messages_are_refused_or_give_a_vector(text: str) -> None:
    refused, given = fuzz.fuzz(text, 150, seed=1)
    assert refused + given == 150 and refused > 0


def test_a_decoder_that_fails_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Codec, data: bytes, layout: object = None) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(topk, "decode", broken)
    with pytest.raises(RuntimeError, match=r"topk\(0.1\): IndexError: out of range; the message is 687a"):
        fuzz.fuzz("topk(0.1)", 3, seed=1)


def test_mutations_repeat_and_differ() -> None:
    whole = fuzz.messages(topk(0.1))
    first, again = (list(itertools.islice(fuzz.mutated(whole, np.random.default_rng(0)), 50)) for _ in range(2))
    assert first == again and len(set(first) - set(whole)) > 40
