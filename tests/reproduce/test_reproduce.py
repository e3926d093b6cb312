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


def test_a_run_is_shown_after_every_round_and_scored_after_some():
    federation = base.bowls(hs.fleet.devices(job="evenly(1.0, 0.2)"))
    rule, schedule = hs.methods.FedAvg(lr=0.1), hs.schedules.fedasync()
    path, done = base.models(federation, rule, schedule, 7)
    assert path.shape == (7, 10)
    assert torch.equal(path[-1], done.state["state.x"])
    assert not torch.equal(path[0], path[1])
    scored = base.follow(federation, rule, schedule, lambda net: float(net.state["x"][0]), 7, every=3)
    assert scored.score.tolist() == path[2::3, 0].tolist()
    assert scored.seconds.tolist() == [record["seconds"] for record in done.history[2::3]]
    assert scored.updates.tolist() == [record["updates"] for record in done.history[2::3]]


def test_a_band_has_the_mean_of_the_seeds_between_the_lowest_and_the_highest():
    _, (ax, other) = base.panels(6, 1, 2)
    base.band(ax, [1, 2, 3], torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.0, 2.0]]), "black", "a rule")
    (line,), (band,) = ax.lines, ax.collections
    assert line.get_xydata().tolist() == [[1, 2], [2, 2], [3, 2]]
    assert {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()} == {(1, 1), (1, 3), (2, 0), (2, 4), (3, 2)}
    assert ax.get_legend_handles_labels()[1] == ["a rule"]
    assert other.get_gridspec().get_width_ratios() == (1, 2)


def test_a_logarithmic_axis_is_numbered_where_it_was_measured():
    _, (ax,) = base.panels(3, 1)
    ax.set(xscale="log", xlim=(0.01, 1))
    base.ticks(ax, (0.02, 0.3))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.02", "0.3"]
    assert not len(ax.get_xticks(minor=True))


def test_the_last_loss_of_runs_of_which_one_diverged():
    assert base.last_loss(torch.tensor([[3.0, 1.0], [3.0, 2.0]])) == 1.5
    assert base.last_loss(torch.tensor([[3.0, 1.0], [3.0, torch.nan]])) == torch.inf
