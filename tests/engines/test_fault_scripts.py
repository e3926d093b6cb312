"""A few of the scripts of ``benchmarks/faults.py``: processes killed while a run goes on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", BENCHMARKS / "faults.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["faults"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROUNDS = 8
    return module


@pytest.fixture(scope="module")
def expected(faults: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert faults.Server(folder, "processes").process.wait() == 0
    return folder


def test_a_run_that_is_hurt_comes_to_the_same(faults: ModuleType, expected: Path, tmp_path: Path) -> None:
    for deed in ("kill a worker", "kill the server"):
        folder = tmp_path / deed.replace(" ", "-")
        faults.script = lambda seed, engine, lasts, deed=deed: [faults.Deed(0.05, deed, 1)]
        done, status = faults.play(0, "processes", folder, lasts=2.0)
        assert done == [deed]
        assert [*faults.wrong(folder, expected, status)] == []


def test_what_is_wrong_is_seen(faults: ModuleType, expected: Path, tmp_path: Path) -> None:
    """The check can fail: on a run that never ended, one that failed, and one with other updates in it."""
    folder = tmp_path / "run"
    assert [*faults.wrong(folder, expected, None)] == ["it had not ended after 240 s"]
    folder.mkdir()
    (folder / "stderr.txt").write_text("hanse: no memory\n")
    assert [*faults.wrong(folder, expected, 1)] == ["status 1: ['hanse: no memory']"]
    for file in expected.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    assert [*faults.wrong(folder, expected, 0)] == []
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    (folder / "ledger.jsonl").write_text("\n".join([*lines[:-1], lines[-1].replace("[[0", "[[1", 1).replace('"', '"x', 1)]) + "\n")
    assert "other updates in rounds" in "; ".join(faults.wrong(folder, expected, 0))
