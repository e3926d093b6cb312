"""Bytes that are not what was sent."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hanse.attacks import Attack, damaged


@given(st.binary(min_size=1, max_size=300), st.integers(1, 40), st.integers(0, 99))
def test_at_most_so_many_bits_are_turned_over(message: bytes, bits: int, seed: int) -> None:
    once, again = (damaged(bits=bits).damage(message, np.random.default_rng(seed)) for _ in range(2))
    turned = sum((a ^ b).bit_count() for a, b in zip(message, once, strict=True))
    assert once == again and turned <= bits and turned % 2 == bits % 2


def test_no_other_attack_touches_bytes() -> None:
    generator = np.random.default_rng(0)
    others = [part for part in Attack.registry().values() if part is not damaged]
    assert all(not part.damages and part().damage(b"hanse", generator) == b"hanse" for part in others)
