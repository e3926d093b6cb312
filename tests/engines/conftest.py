"""Small federations in float64."""

from pathlib import Path

import pytest

import hanse as hs


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Arrangements are remembered per test."""
    monkeypatch.setenv("HANSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def ragged() -> hs.Federation:
    """Digits on twelve clients with 1 to 400 samples."""
    return hs.Federation(hs.tasks.digits(hidden=8), clients=12, partition=hs.dirichlet(0.3), dtype="float64")


@pytest.fixture(scope="session")
def even() -> hs.Federation:
    """Digits on twelve clients with equally many samples."""
    return hs.Federation(hs.tasks.digits(hidden=8), clients=12, dtype="float64")
