from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, port: int) -> Path:
    """A federation as 'hanse deploy' writes it, with data at its nodes."""
    from healthy import CSV, NOW, RUN

    from hanse.deploy.app import write

    folder = tmp_path_factory.mktemp("doctor") / "fed"
    write(RUN, folder, ["ada", "bob"], f"127.0.0.1:{port}", now=NOW)
    for name in ("ada", "bob"):
        data = folder / "nodes" / name / "data"
        data.mkdir()
        (data / "points.csv").write_text(CSV)
    return folder


@pytest.fixture
def fed(made: Path, tmp_path: Path, nobodys_data: None) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "fed"))


@pytest.fixture
def nobodys_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever reads a node's own data names their folder in the environment."""
    monkeypatch.setenv("HANSE_DATA", str(tmp_path / "nobody's"))
