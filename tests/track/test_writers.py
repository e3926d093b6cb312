"""Trackers outside hanse."""

import importlib.util
from pathlib import Path

import made_runs
import pytest

import hanse as hs
from hanse.core.errors import MissingExtraError
from hanse.track.writers import WRITERS, scalars


def test_a_round_as_flat_numbers() -> None:
    record = made_runs.record(3, accuracy=0.5, loss=2.0, down=7, up=9, seconds=1.5)
    assert scalars({**record, "updates": 6, "staleness": 0.25}) == {
        "train_loss": 2.0,
        "test_loss": 2.0,
        "accuracy": 0.5,
        "virtual_seconds": 1.5,
        "bytes_down": 7,
        "bytes_up": 9,
        "client_updates": 6,
        "staleness": 0.25,
    }
    assert scalars({**record, "epsilon": 0.7})["epsilon"] == 0.7


def test_tensorboard_files_hold_every_round(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    federation = hs.Federation(hs.tasks.digits(hidden=4), clients=4, fleet=hs.fleet.phones())
    writer = WRITERS["tensorboard"]("a run", tmp_path, {"task": "digits"})
    engine = hs.engines.local("stacked", 4, 1, 1)
    run = hs.run(federation, hs.methods.FedAvg(), hs.schedules.fedasync(), rounds=4, evaluate=2, engine=engine, writers=[writer])
    assert run.history[-1]["staleness"] > 0
    events = EventAccumulator(str(tmp_path)).Reload()
    everywhere = ("train_loss", "virtual_seconds", "bytes_down", "bytes_up", "client_updates", "staleness")
    for name in (*everywhere, "accuracy", "client_accuracy_worst10"):
        expected = [(r["round"], scalars(r)[name]) for r in run.history if name in scalars(r)]
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(t, pytest.approx(v, rel=1e-6)) for t, v in expected]
        assert len(expected) == (2 if "accuracy" in name else 4)
    assert b"task = digits" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_extra_is_named(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(
        MissingExtraError, match=rf"track = {name} needs the extra '{name}': pip install 'hanse\[{name}\]'"
    ) as caught:
        WRITERS[name]("a run", tmp_path, {})
    assert caught.value.exit_status == 2


def test_mlflow_keeps_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    writer = WRITERS["mlflow"]("a run", tmp_path, {"task": "digits"})
    for t in (1, 2, 3):
        writer.write(made_runs.record(t, accuracy=0.1 * t))
    writer.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("hanse").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params == {"task": "digits"}
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert [(m.step, m.value) for m in history] == [(t, pytest.approx(0.1 * t)) for t in (1, 2, 3)]


def test_wandb_keeps_every_round_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    writer = WRITERS["wandb"]("a run", tmp_path, {"task": "digits"})
    for t in (1, 2, 3):
        writer.write(made_runs.record(t, accuracy=0.1 * t))
    writer.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
