"""Every rule with every seed in one folder."""

import importlib.util
from pathlib import Path

import pytest

import hanse as hs
from hanse.config import Settings
from hanse.core.errors import CheckpointError, ConfigError, MissingExtraError
from hanse.study import Cell, Study, runs_in
from hanse.track.folder import Folder

SMALL = {"task": "digits(hidden=4)", "clients": 6, "cohort": 3, "rounds": 3, "engine": 'local("stacked", 3, 1, 1)'}


def study(folder: Path, **values: object) -> Study:
    return Study(Settings.read(None, {**SMALL, **values}), folder)


def test_a_folder_a_run(tmp_path: Path) -> None:
    made = study(tmp_path, method=["FedAvg", "FedProx(mu=0.1)", "FedProx(mu=1.0)"], seed=[0, 5])
    runs = made.run()
    names = ["fedavg-seed0", "fedprox-1-seed0", "fedprox-2-seed0", "fedavg-seed5", "fedprox-1-seed5", "fedprox-2-seed5"]
    assert [cell.path.name for cell in made.cells()] == names
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == sorted(names)
    assert [(r.method, r.seed) for r in runs] == [
        ("FedAvg", 0),
        ("FedProx", 0),
        ("FedProx", 0),
        ("FedAvg", 5),
        ("FedProx", 5),
        ("FedProx", 5),
    ]
    assert [r.history for r in runs_in(tmp_path)] == [Folder(tmp_path / n).read().history for n in names]
    assert len({r.history[-1]["loss"] for r in runs}) == 6


def test_runs_of_an_earlier_study_in_the_folder_are_not_mixed_in(tmp_path: Path) -> None:
    study(tmp_path, method=["FedAvg", "Scaffold"], seed=0).run()
    study(tmp_path, method="FedProx", seed=0).run()
    assert [r.method for r in runs_in(tmp_path)] == ["FedProx"]


def test_the_same_as_in_python(tmp_path: Path) -> None:
    (run,) = study(tmp_path, partition="dirichlet(0.5)", fleet="phones", method="Scaffold", seed=2, codec="topk(0.5)").run()
    federation = hs.Federation(hs.tasks.digits(4), 6, hs.dirichlet(0.5), hs.fleet.phones(), seed=2)
    by_hand = hs.run(
        federation, hs.methods.Scaffold(), hs.schedules.synchronous(3), rounds=3, codec=hs.codecs.topk(0.5),
        engine=hs.engines.local("stacked", 3, 1, 1),
    )  # fmt: skip
    assert by_hand.history == run.history and by_hand.settings == run.settings
    assert all(bool((by_hand.weights[n] == w).all()) for n, w in run.weights.items())


def test_privacy_is_the_same_as_in_python_and_in_a_resumed_study(tmp_path: Path) -> None:
    """The estimate comes before, and leaves the bound alone."""
    parts = ["differential(noise=0.5, adaptive=True, bit_noise=1.0)", "secure(threshold=0.6)"]
    (run,) = study(tmp_path, method="FedAvg(weights='uniform')", privacy=parts).run()
    by_hand = hs.run(
        hs.Federation(hs.tasks.digits(4), 6), hs.methods.FedAvg(weights="uniform"), hs.schedules.synchronous(3), rounds=3,
        engine=hs.engines.local("stacked", 3, 1, 1), privacy=[hs.privacy.Privacy.parse(p) for p in parts],
    )  # fmt: skip
    assert by_hand.history == run.history and by_hand.settings == run.settings
    assert all(bool((by_hand.weights[n] == w).all()) for n, w in run.weights.items())
    assert run.notes["estimated bytes up"].endswith(", 1.00 of it") and run.notes["estimated bytes down"].endswith(", 1.00 of it")
    (again,) = Study.open(tmp_path).run(resume=True)
    assert again.history == run.history
    assert Study.open(tmp_path).privacy == [hs.privacy.Privacy.parse(p) for p in parts]


def test_what_cannot_be_private_is_refused_before_any_run(tmp_path: Path) -> None:
    for values, message in (
        ({"privacy": "differential"}, "weights='uniform'"),
        ({"privacy": "secure", "schedule": "fedbuff", "cohort": None}, "schedule: fedbuff"),
        ({"privacy": ["secure", "secure(bits=64)"]}, "at most one of a kind"),
    ):
        with pytest.raises(ConfigError, match=message):
            study(tmp_path, **values).run()
    assert not list(tmp_path.iterdir())


def test_the_split_seed_keeps_split_weights_and_fleet(tmp_path: Path) -> None:
    made = study(tmp_path, seed=[1, 2], split_seed=9, fleet="phones", cohort=6, rounds=1)
    first, second = made.run()
    assert first.clients["classes"].tolist() == second.clients["classes"].tolist()
    assert first.history[0]["seconds"] == second.history[0]["seconds"] and first.history[0]["loss"] != second.history[0]["loss"]


def test_finished_runs_are_read_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"method": ["FedAvg", "Scaffold"], "seed": [0, 1]}
    expected = study(tmp_path / "whole", **values).run()
    made = study(tmp_path / "half", **values)
    run_one = made._run_one

    def interrupted(cell: Cell, *rest: object) -> hs.Run:
        if cell.path.name == "scaffold-seed0":
            made.interrupt()
        return run_one(cell, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(made, "_run_one", interrupted)
    made.run()
    assert made.stopped and not (tmp_path / "half" / "fedavg-seed1").exists()
    assert len(Folder(tmp_path / "half" / "scaffold-seed0").history()) < 3
    before = (tmp_path / "half" / "fedavg-seed0" / "run.json").stat().st_mtime_ns
    resumed = Study.open(tmp_path / "half").run(resume=True)
    assert [r.history for r in resumed] == [r.history for r in expected]
    assert (tmp_path / "half" / "fedavg-seed0" / "run.json").stat().st_mtime_ns == before


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    made = study(tmp_path)
    made.interrupt()
    with pytest.raises(KeyboardInterrupt):
        made.interrupt()
    assert made.run() == []


def test_the_estimate_is_judged_afterwards(tmp_path: Path) -> None:
    (run,) = study(tmp_path, fleet="phones").run()
    notes = Folder(tmp_path / "fedavg-seed0").read().notes
    assert notes == run.notes and ", 1.00 of it" in notes["estimated bytes up"] and ", 1.00 of it" in notes["estimated bytes down"]
    assert {"estimated time here", "estimated virtual time", "peak memory of the process", "arrangement"} <= notes.keys()


def test_what_is_wrong_is_found_before_any_work(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, object], str]] = [
        ({"method": ["FedAvg", "Fedprix"]}, "unknown name 'Fedprix'; did you mean FedProx"),
        ({"cohort": 7}, "cohort: 7 is not allowed: at most the number of clients, 6"),
        ({"codec": "zip"}, "codec: unknown name 'zip'"),
        ({"engine": "local(chunk=0)"}, "local.chunk: 0 is not allowed"),
    ]
    for values, message in wrong:
        with pytest.raises(ConfigError, match=message):
            study(tmp_path / "x", **values).run()
    assert not (tmp_path / "x").exists()


def test_a_tracker_that_is_not_installed_is_found_before_any_work(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(MissingExtraError, match="track = wandb"):
        study(tmp_path, track="wandb")


def test_no_study_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        Study.open(tmp_path)
    with pytest.raises(CheckpointError, match="holds no run"):
        runs_in(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"out: .* cannot be written: Not a directory"):
        study(tmp_path / "file" / "x").run()


def test_a_later_study_is_not_resumed_with_runs_of_the_earlier_one(tmp_path: Path) -> None:
    study(tmp_path, method=["FedAvg", "FedProx"], seed=0).run()
    later = study(tmp_path, method=["FedAvg", "FedProx"], seed=0, partition="dirichlet(0.5)")
    later._prepare(resume=False)  # killed before its first run
    assert {r.settings["partition"].split("(")[0] for r in Study.open(tmp_path).run(resume=True)} == {"dirichlet"}
