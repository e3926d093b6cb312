"""A run with real clients behind Flower equals the simulated one, bit for bit and byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hanse as hs
from hanse.config import Settings
from hanse.core.errors import ConfigError
from hanse.deploy.share import deployed, one_of_each, with_own_data

SETTINGS = {
    "task": "digits(hidden=8)",
    "clients": 2,
    "partition": "dirichlet(0.5)",
    "method": "Scaffold",
    "schedule": "synchronous(cohort=2)",
    "codec": "feedback(topk(0.3) | uniform(8))",
    "rounds": 2,
}


def test_a_deployed_run_equals_a_simulated_one(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    from hanse.deploy.here import run

    settings = Settings.read(None, {**SETTINGS, "engine": "flower(path='stacked', threads=1)"})
    real = run(settings, tmp_path)
    parts, alone = settings.parts(), {"path": "stacked", "chunk": 1, "workers": 1, "threads": 1, "shortcuts": False}
    simulated = hs.run(
        settings.federation(0),
        parts.methods[0],
        parts.schedules[0],
        rounds=2,
        codec=parts.codecs[0],
        engine=hs.engines.local(**alone),
    )
    assert [name for name, t in simulated.weights.items() if not torch.equal(t, real.weights[name])] == []
    for mine, theirs in zip(real.history, simulated.history, strict=True):
        assert [mine[n] for n in ("round", "loss", "bytes_up", "bytes_down", "cohort")] == [
            theirs[n] for n in ("round", "loss", "bytes_up", "bytes_down", "cohort")
        ]


def test_settings_of_several_runs_are_refused() -> None:
    with pytest.raises(ConfigError, match="seed: 0, 1 is not allowed in a deployed run: one"):
        one_of_each(Settings.read(None, {**SETTINGS, "seed": "0,1"}))


@pytest.mark.parametrize(("field", "value"), [("engine", "processes"), ("privacy", "secure"), ("attack", "sign_flip(share=0.2)")])
def test_what_can_only_be_simulated_is_refused(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: .* is not allowed in a deployed run"):
        deployed(Settings.read(None, {**SETTINGS, field: value}))


def test_what_is_about_simulated_clients_means_nothing_to_real_ones() -> None:
    with pytest.raises(ConfigError, match=r"flower\.chunk: 5 is not allowed: it is about simulated clients"):
        hs.engines.flower(chunk=5)


def test_the_engine_is_flower_unless_it_says_how() -> None:
    assert deployed(Settings.read(None, SETTINGS)).engine == "flower"
    assert deployed(Settings.read(None, {**SETTINGS, "engine": "flower(grace=5)"})).engine == "flower(grace=5)"


def test_a_client_has_what_is_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of it, whatever the partition; other clients have nothing."""
    monkeypatch.setenv("HANSE_DATA", "elsewhere")
    data = tmp_path / "data"
    data.mkdir()
    rows = [f"{i},{i % 7},{'yes' if i % 3 else 'no'}" for i in range(50)]
    (data / "people.csv").write_text("\n".join(["age,visits,ill", *rows]) + "\n")
    settings = Settings.read(None, {**SETTINGS, "task": "table('people.csv', label='ill')", "clients": 3})
    federation = with_own_data(settings, 1, data)
    assert federation.split.train.counts().tolist() == [0, 40, 0]
    assert federation.split.names == ("no", "yes")
    assert len(federation.split.train.of(1)[0]) == 40


def test_without_a_folder_a_client_has_its_part(tmp_path: Path) -> None:
    settings = Settings.read(None, SETTINGS)
    federation = with_own_data(settings, 1, tmp_path / "none")
    assert federation.split.train.counts().tolist() == settings.federation(0).split.train.counts().tolist()
