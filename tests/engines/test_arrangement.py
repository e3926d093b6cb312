"""How clients are laid out on the machine: chosen once, remembered, noted, and never beyond what the model allows."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small_networks import network
from torch import Tensor, nn

import hanse as hs
from hanse.engines.arrangement import candidates
from hanse.engines.execution import Executor, Lane


def go(federation: hs.Federation, engine: hs.engines.local | None = None) -> hs.Run:
    return hs.run(federation, hs.methods.FedAvg(), hs.schedules.synchronous(6), rounds=1, evaluate=0, engine=engine)


@pytest.fixture(scope="session")
def open_choice() -> hs.Federation:
    """A frozen layer leaves the stacked path out, so that there is something to choose."""
    return hs.Federation(hs.tasks.digits(hidden=8), clients=12, dtype="float64", frozen=("0.*",))


def timed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows with every execution, of a round's own work too."""
    calls: list[bool] = []
    run = Executor.run

    def counting(self: Executor, *arguments: Any, **options: Any) -> list[Lane]:
        calls.append(True)
        return run(self, *arguments, **options)

    monkeypatch.setattr(Executor, "run", counting)
    return calls


def test_the_choice_is_remembered_and_used_again(open_choice: hs.Federation, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = timed(monkeypatch)
    first = go(open_choice)
    trials = len(calls)
    (file,) = cache.glob("arrangements/*.json")
    assert trials > 2
    second = go(open_choice)
    assert len(calls) == trials + 1 and second.notes == first.notes
    for choice in candidates(network(open_choice, path=None, chunk=None, workers=None, threads=None), torch.arange(6)):
        file.write_text(json.dumps(choice))
        engine = hs.engines.local.parse(go(open_choice).notes["arrangement"])
        assert engine.fixed() == choice


def test_the_engine_resolved_is_noted(even: hs.Federation, quick: None) -> None:
    fixed = hs.engines.local("loop", 2, 1, 1, precision="bf16")
    assert go(even, fixed).notes["arrangement"] == fixed.full()
    note = go(even).notes["arrangement"]
    found = hs.engines.local.parse(note)
    assert found.fixed() is not None
    assert go(even, found).notes["arrangement"] == note


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the first candidate instead of timing them all."""
    monkeypatch.setattr("hanse.engines.arrangement._Trial.__call__", lambda self, option: 1.0)


@pytest.mark.parametrize("text", ["", "{}", "null", "[1, 2]", '["no path", 1, 1, 1]', '["loop", 0, 1, 1]', '["loop", "x", 1, 1]'])
def test_a_damaged_memory_is_ignored(open_choice: hs.Federation, cache: Path, quick: None, text: str) -> None:
    first = go(open_choice)
    (file,) = cache.glob("arrangements/*.json")
    good = file.read_text()
    file.write_text(text)
    assert go(open_choice).notes == first.notes and file.read_text() == good


def test_a_choice_for_one_model_is_not_taken_for_another(cache: Path, quick: None) -> None:
    """The models print alike, but other layers are frozen."""
    for frozen in (("2.*",), ("0.*",)):
        go(hs.Federation(hs.tasks.digits(hidden=8), clients=12, frozen=frozen))
    assert len(list(cache.glob("arrangements/*.json"))) == 2


def test_no_cache_folder_is_no_error(even: hs.Federation, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HANSE_CACHE", str(tmp_path / "file" / "below"))
    assert go(even).notes["arrangement"]


def test_what_is_fixed_stays(open_choice: hs.Federation) -> None:
    net = network(open_choice, path=None, chunk=3, workers=None, threads=1)
    options = candidates(net, torch.arange(12))
    assert len(options) > 1 and all(o.chunk == 3 and o.threads == 1 and o.path in net.paths for o in options)


def test_nothing_is_timed_where_there_is_one_way(even: hs.Federation, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = timed(monkeypatch)
    go(even, hs.engines.local(workers=1, chunk=6))
    assert len(calls) == 1 and not list(cache.glob("arrangements/*.json"))


class Branching(nn.Module):
    """Looks at its numbers, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out if bool(out.mean() > 0) else -out


class branching(hs.tasks.digits):
    """Digits through a model that cannot be batched."""

    abstract: ClassVar[bool] = True

    def model(self) -> nn.Module:
        return Branching()


def test_a_model_that_vmap_cannot_run_falls_to_the_loop() -> None:
    assert "path='loop'" in go(hs.Federation(branching(), clients=6)).notes["arrangement"]


def test_threads_of_the_caller_are_left_as_they_were(even: hs.Federation) -> None:
    before = torch.get_num_threads()
    go(even, hs.engines.local("loop", 2, 1, before + 1))
    assert torch.get_num_threads() == before
