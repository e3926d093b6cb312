"""Small rows for the tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


def made(p: int = 11, n: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers ``[p, n]``."""
    return torch.randn(p, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


some_rows = st.builds(made, st.integers(7, 15), st.integers(3, 20), st.integers(0, 10_000))
"""Rows enough for every rule with f = 1."""


def rotation(n: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix."""
    return torch.linalg.qr(made(n, n, seed))[0]


EVERY = (
    "mean", "krum(1)", "multi_krum(1)", "geometric_median", "centred_clipping(1.5, iterations=3)", "flag", "flag(m=1, lam=2)",
    "median", "trimmed_mean(1)", "meamed(1)", "phocas(1)", "bulyan(1)",
    "nnm(1) | krum(1)", "nnm(1) | trimmed_mean(1)", "clipping | mean", "clipping(1.5) | nnm(1) | median",
)  # fmt: skip
"""Rules that can do with seven rows."""
