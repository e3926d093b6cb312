"""How experiments are run and written down; the experiments themselves take minutes and are run by ``hanse reproduce``."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

import hanse as hs
from hanse import reproduce
from hanse.reproduce import Findings, Property, base


@pytest.fixture
def findings():
    held = Property("larger", "two is more than one", "2 > 1", True)
    return Findings("Numbers", "Counted.", [held], ("number", "value"), [["one", "1"], ["two", "2"]], Figure())


@pytest.fixture
def experiments(monkeypatch, findings):
    """``momentum`` holds, ``fedspeed`` does not."""
    failed = replace(findings, properties=[*findings.properties, Property("smaller", "two is less than one", "2 > 1", False)])
    for slug, result in (("momentum", findings), ("fedspeed", failed)):
        monkeypatch.setattr(import_module(f"hanse.reproduce.{slug}"), "reproduce", lambda result=result: result)


@pytest.mark.parametrize(
    ("slugs", "held"), [(["momentum"], True), (["fedspeed"], False), (["fedspeed", "momentum"], False), ([], True)]
)
def test_all_properties_of_all_slugs_must_hold(experiments, tmp_path, slugs, held):
    assert reproduce.run(slugs, tmp_path, Console(quiet=True)) is held
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(slugs)


def test_what_is_written(experiments, tmp_path):
    console = Console(record=True, width=120, file=(tmp_path / "out.txt").open("w"))
    reproduce.run(["fedspeed"], tmp_path, console)
    folder = tmp_path / "fedspeed"
    result = json.loads((folder / "result.json").read_text())
    assert result["holds"] is False
    assert [p["holds"] for p in result["properties"]] == [True, False]
    assert result["measurements"] == [{"number": "one", "value": "1"}, {"number": "two", "value": "2"}]
    assert "| smaller | two is less than one | 2 > 1 | no |" in (folder / "report.md").read_text()
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "two is less than one" in console.export_text()


def test_an_unknown_slug_is_refused_before_anything_runs(experiments, tmp_path):
    with pytest.raises(hs.ConfigError, match=r"'momentun'; did you mean momentum"):
        reproduce.run(["momentum", "momentun"], tmp_path, Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(findings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(hs.CheckpointError, match="cannot be written"):
        base.save(findings, tmp_path / "file" / "folder")


def test_scores_are_those_of_the_model_after_every_round(monkeypatch):
    monkeypatch.setattr(base, "SEEDS", (0, 1))
    federations = base.digit_federations(5, hs.iid())
    rule = hs.methods.FedAvg(lr=0.1)
    accuracy = base.scores(federations, rule, 3, 2, base.test_accuracy)
    loss = base.scores(federations, rule, 3, 2, base.train_loss)
    assert accuracy.shape == loss.shape == (2, 2)
    engine = hs.engines.local(path="stacked", chunk=3, workers=1, threads=1)
    for row, federation in zip(accuracy, federations, strict=True):
        history = hs.run(federation, rule, hs.schedules.synchronous(cohort=3), rounds=2, engine=engine).history
        assert row.tolist() == pytest.approx([record["metrics"]["accuracy"] for record in history])
    assert bool((loss[:, 1] < loss[:, 0]).all())


def test_a_run_that_diverges_has_no_later_scores(monkeypatch):
    monkeypatch.setattr(base, "SEEDS", (0,))
    found = base.scores(base.digit_federations(5, hs.iid()), hs.methods.FedAvg(lr=1e20, epochs=5), 3, 6, base.train_loss)
    assert bool(torch.isnan(found[0, -1]))


def test_distance_to_the_optimum_of_the_quadratics():
    assert base.distance_to_optimum(hs.methods.Scaffold(lr=0.1, steps=10), 10, 40) < 1e-10
    assert base.distance_to_optimum(hs.methods.FedAvg(lr=0.1, steps=10), 10, 40) == pytest.approx(0.28, abs=0.01)
