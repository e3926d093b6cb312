"""Runs: what they return, how they are stopped, killed, resumed, and how they fail."""

import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import killed_run
import pytest
import torch
from killed_run import ROUNDS, Slow

import hanse as hs
from hanse import experiment
from hanse.config import Settings
from hanse.core.messages import Tensors
from hanse.core.optim import constant, cosine
from hanse.engines.simulation import Simulation
from hanse.track.folder import CHECKPOINT, CLIENTS, HISTORY, Folder
from hanse.track.run import Record, Run

ENGINE = hs.engines.local("stacked", 4, 1, 1)


@pytest.fixture(scope="module")
def federation() -> hs.Federation:
    return hs.Federation(hs.tasks.digits(hidden=8), clients=12, partition=hs.dirichlet(0.3))


def go(federation: hs.Federation, rule: hs.methods.Method | None = None, **options: object) -> Run:
    return hs.run(
        federation, rule or hs.methods.FedAvg(), hs.schedules.synchronous(4), **{"rounds": 4, "engine": ENGINE, **options}
    )  # type: ignore[arg-type]


def same(one: Run, other: Run) -> bool:
    """Everything a run returns, bit for bit."""

    def equal(a: Tensors, b: Tensors) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[n].nan_to_num(-1), b[n].nan_to_num(-1)) for n in a)

    return repr(one.history) == repr(other.history) and equal(one.weights, other.weights) and equal(one.clients, other.clients)


# ---- what a run returns


def test_history_weights_and_clients(federation: hs.Federation) -> None:
    run = go(federation, rounds=5, evaluate=2)
    assert [r["round"] for r in run.history] == [1, 2, 3, 4, 5]
    assert [bool(r["metrics"]) for r in run.history] == [False, True, False, True, True]
    last = run.history[-1]["metrics"]
    assert {"accuracy", "test_loss", "client_accuracy", "client_accuracy_worst10", "client_accuracy_variance"} <= last.keys()
    split, problem = federation.split, federation.problem
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    model.load_state_dict(run.weights)
    with torch.no_grad():
        right = model(split.test_x).argmax(1) == split.test_y
        each = [(model(x).argmax(1) == y).double().mean() for x, y in (split.test.of(c) for c in range(12)) if len(y)]
    assert last["accuracy"] == pytest.approx(float(right.double().mean()))
    assert last["client_accuracy"] == pytest.approx(float(torch.stack(each).mean()))
    assert last["client_accuracy_variance"] == pytest.approx(float(torch.stack(each).var(correction=0)))
    assert last["client_accuracy_worst10"] == pytest.approx(float(torch.stack(each).min()))
    own = run.clients["accuracy"]
    assert torch.equal(own[~own.isnan()], torch.stack(each))
    assert torch.equal(run.clients["samples"], split.train.counts()) and int(run.clients["rounds"].sum()) == 20
    assert run.weights.keys() == {e.name for e in problem.layout.entries}


def test_evaluation_only_at_the_end(federation: hs.Federation) -> None:
    assert [bool(r["metrics"]) for r in go(federation, evaluate=0).history] == [False, False, False, True]


def test_a_run_folder_holds_the_run(federation: hs.Federation, tmp_path: Path) -> None:
    run = go(federation, out=tmp_path)
    assert same(Folder(tmp_path).read(), run) and Folder(tmp_path).read().settings == run.settings


@pytest.mark.parametrize("seed", [0, 3])
def test_settings_in_a_folder_rebuild_the_same_run(tmp_path: Path, seed: int) -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=9, partition=hs.dirichlet(0.7), fleet=hs.fleet.phones(), seed=2)
    rule = hs.methods.FedProx(mu=0.3, lr=cosine(0.2, rounds=9), clip=1.5)
    run = go(federation, rule, out=tmp_path, seed=seed, codec=hs.codecs.topk(0.3))
    settings = Settings.read(None, Folder(tmp_path).read().settings)
    (method,), (schedule,), (codec,), _, engine, *_ = settings.parts()
    again = hs.run(
        settings.federation(settings.seed[0]), method, schedule, rounds=settings.rounds, codec=codec, engine=engine,
        seed=settings.seed[0], evaluate=settings.evaluate,
    )  # fmt: skip
    assert same(again, run) and again.settings == run.settings


# ---- stopping and going on


class Stop:
    """Asks the network to stop after a round: before its record is written, or after."""

    def __init__(self, after: int) -> None:
        self.after, self.net = after, None

    net: Simulation | None

    def start(self, net: Simulation) -> None:
        self.net = net

    def write(self, record: Record) -> None:
        assert self.net is not None
        self.net.stopping |= record["round"] == self.after

    def close(self) -> None:
        pass


RULES = [hs.methods.FedAvg(), hs.methods.Scaffold(), hs.methods.FedAdam(lr=0.05), hs.methods.FedAvg(local="adamw", lr=0.01)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_stopped_run_goes_on_to_the_same_end(federation: hs.Federation, rule: hs.methods.Method, tmp_path: Path) -> None:
    """Its state is saved even when the wish to stop comes after the round's own chance to save."""
    expected, stop = go(federation, rule, rounds=6), Stop(after=2)
    half = go(federation, rule, rounds=6, out=tmp_path, writers=[stop], on_start=stop.start)
    assert len(half.history) == 2
    saved = Folder(tmp_path).load()
    assert saved is not None and int(saved["counters"][0]) == 2
    assert same(hs.resume(tmp_path), expected)
    assert same(hs.resume(tmp_path), expected)  # a finished run stays as it is


def test_a_run_stopped_before_its_first_round(federation: hs.Federation, tmp_path: Path) -> None:
    expected = go(federation)
    none = go(federation, out=tmp_path, on_start=lambda net: setattr(net, "stopping", True))
    assert none.history == []
    assert same(hs.resume(tmp_path), expected)


def test_private_rows_and_statistics_come_back(tmp_path: Path) -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=6, private=("2.*",))
    expected, stop = go(federation, rounds=6), Stop(after=3)
    go(federation, rounds=6, out=tmp_path, writers=[stop], on_start=stop.start)
    assert same(hs.resume(tmp_path), expected)


def test_rounds_without_anyone_come_back(federation: hs.Federation, tmp_path: Path) -> None:
    schedule, options = hs.schedules.synchronous(1, draw="bernoulli"), {"rounds": 12, "engine": ENGINE}
    expected = hs.run(federation, hs.methods.FedAvg(), schedule, **options)  # type: ignore[arg-type]
    empty = next(r["round"] for r in expected.history[2:] if not r["cohort"])
    stop = Stop(after=empty - 1)
    hs.run(federation, hs.methods.FedAvg(), schedule, out=tmp_path, writers=[stop], on_start=stop.start, **options)  # type: ignore[arg-type]
    assert same(hs.resume(tmp_path), expected)


def test_a_task_that_has_no_name_needs_its_federation(federation: hs.Federation, tmp_path: Path) -> None:
    stop = Stop(after=1)
    go(federation, out=tmp_path, writers=[stop], on_start=stop.start)
    assert same(hs.resume(tmp_path, federation), go(federation))


def test_the_arrangement_of_a_resumed_run_is_the_one_it_began_with(
    federation: hs.Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANSE_CACHE", str(tmp_path / "one"))
    stop = Stop(after=2)
    half = go(federation, out=tmp_path / "run", engine=None, writers=[stop], on_start=stop.start)
    monkeypatch.setenv("HANSE_CACHE", str(tmp_path / "other"))
    assert hs.resume(tmp_path / "run").notes["arrangement"] == half.notes["arrangement"]
    assert not (tmp_path / "other").exists()


# ---- work under way


UNEVEN = hs.fleet.devices(
    job="exponential(1.0)", latency=0.05, up=0.5, loss=0.15, duplicates=0.1, trace="bernoulli(0.8, slot=1.5, lost=True)"
)
FLOWS = {
    "fedbuff": "fedbuff(buffer=3, cohort=6, patience=4.0)",
    "unbiased": "fedbuff(buffer=3, weights='unbiased')",
    "fedfix": "fedfix(window=0.8, patience=3.0)",
    "fedasync": "fedasync(patience=4.0)",
    "deadline": "synchronous(cohort=4, over=0.5, deadline=1.5, least=1)",
}
WORK: dict[str, tuple[hs.methods.Method, hs.codecs.Codec]] = {
    "FedAvg": (hs.methods.FedAvg(lr="exponential(0.2, 0.9)"), hs.codecs.identity()),
    "Scaffold": (hs.methods.Scaffold(), hs.codecs.identity()),
    "top-k": (hs.methods.Scaffold(), hs.codecs.topk(0.2)),
}


@pytest.fixture(scope="module")
def uneven() -> hs.Federation:
    return hs.Federation(hs.tasks.digits(hidden=4), clients=12, partition=hs.dirichlet(0.3), fleet=UNEVEN)


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("flow", FLOWS)
def test_a_run_with_work_under_way_goes_on_to_the_same_end(uneven: hs.Federation, tmp_path: Path, flow: str, work: str) -> None:
    """Stopped early and late and resumed: weights, history with times and bytes, and the whole last checkpoint."""
    rule, codec = WORK[work]
    schedule = hs.schedules.Schedule.parse(FLOWS[flow])

    def go_on(out: Path, **options: Any) -> Run:
        return hs.run(uneven, rule, schedule, rounds=12, codec=codec, engine=ENGINE, evaluate=3, out=out, **options)

    expected = go_on(tmp_path / "whole")
    end = Folder(tmp_path / "whole").load()
    under_way = 0
    for after in (1, 7):
        stop, out = Stop(after), tmp_path / str(after)
        assert len(go_on(out, writers=[stop], on_start=stop.start).history) == after
        saved = Folder(out).load()
        assert saved is not None and end is not None
        under_way += len(saved["clock.out"]) + len(saved["clock.arrived"])
        assert same(hs.resume(out), expected)
        last = Folder(out).load()
        assert last is not None and last.keys() == end.keys()
        assert all(torch.equal(last[n].nan_to_num(-1), t.nan_to_num(-1)) for n, t in end.items())
    assert under_way > 0 or flow == "deadline"
    assert expected.history[-1]["seconds"] > 0 and expected.history[-1]["updates"] > 0


def test_a_run_that_is_stopped_in_every_round_comes_to_the_same_end(uneven: hs.Federation, tmp_path: Path) -> None:
    rule, schedule = hs.methods.Scaffold(), hs.schedules.Schedule.parse(FLOWS["fedbuff"])
    expected = hs.run(uneven, rule, schedule, rounds=6, engine=ENGINE)
    stop = Stop(1)
    hs.run(uneven, rule, schedule, rounds=6, engine=ENGINE, out=tmp_path, writers=[stop], on_start=stop.start)
    for after in range(2, 6):
        stop = Stop(after)
        settings = Settings.read(None, Folder(tmp_path).read().settings)
        hs.run(
            uneven,
            rule,
            schedule,
            rounds=settings.rounds,
            engine=ENGINE,
            out=tmp_path,
            writers=[stop],
            on_start=stop.start,
            resume=True,
        )
    assert same(hs.resume(tmp_path), expected)


# ---- virtual time


def test_a_run_ends_when_its_time_is_over(uneven: hs.Federation, tmp_path: Path) -> None:
    """With the first round that is not over before; it is the last one, so it is evaluated, and saved as the end."""
    rule, schedule = hs.methods.FedAvg(), hs.schedules.Schedule.parse(FLOWS["fedbuff"])
    longer = hs.run(uneven, rule, schedule, rounds=12, engine=ENGINE, evaluate=0)
    times = [record["seconds"] for record in longer.history]
    limit = (times[4] + times[5]) / 2
    run = hs.run(uneven, rule, schedule, rounds=12, seconds=limit, engine=ENGINE, evaluate=0, out=tmp_path)
    assert [record["seconds"] for record in run.history] == times[:6]
    assert [bool(record["metrics"]) for record in run.history] == [False] * 5 + [True]
    assert run.settings["seconds"] == str(limit) and Folder(tmp_path).complete()
    assert same(hs.resume(tmp_path), run)


def test_a_run_stopped_before_its_time_goes_on_until_then(uneven: hs.Federation, tmp_path: Path) -> None:
    rule, schedule, options = hs.methods.FedAvg(), hs.schedules.Schedule.parse(FLOWS["fedfix"]), {"seconds": 5.0, "rounds": 100}
    expected, stop = hs.run(uneven, rule, schedule, engine=ENGINE, **options), Stop(3)  # type: ignore[arg-type]
    hs.run(uneven, rule, schedule, engine=ENGINE, out=tmp_path, writers=[stop], on_start=stop.start, **options)  # type: ignore[arg-type]
    assert not Folder(tmp_path).complete() and same(hs.resume(tmp_path), expected)
    assert expected.history[-2]["seconds"] < 5.0 <= expected.history[-1]["seconds"] and len(expected.history) < 100


def test_whichever_comes_first_ends_a_run(federation: hs.Federation, uneven: hs.Federation) -> None:
    schedule = hs.schedules.Schedule.parse(FLOWS["fedasync"])
    assert len(hs.run(uneven, hs.methods.FedAvg(), schedule, rounds=3, seconds=1e9, engine=ENGINE).history) == 3
    assert len(go(federation, rounds=3, seconds=1.0).history) == 3  # time stands still on an ideal fleet
    with pytest.raises(hs.ConfigError, match="seconds: '0' is not allowed"):
        go(federation, seconds=0)


# ---- kill -9


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return killed_run.run(tmp_path_factory.mktemp("whole"), 0)


@pytest.mark.parametrize("moment", range(4))
def test_kill_at_a_random_moment(uninterrupted: Run, tmp_path: Path, moment: int) -> None:
    """Killed three times at a random moment, and once before the first checkpoint; the end is the same, bit for bit."""
    never = moment == 3
    process = subprocess.Popen([sys.executable, killed_run.__file__, str(tmp_path), "1e9" if never else "0.05"])
    try:
        while not (tmp_path / HISTORY).is_file() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.3 if never else random.Random(moment).uniform(0.05, 1.2))
        assert process.poll() is None, "the run was over before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = len(Folder(tmp_path).history())
    assert done < ROUNDS and (tmp_path / CHECKPOINT).is_file() != never
    assert same(hs.resume(tmp_path, writers=[Slow(0)]), uninterrupted)
    assert same(Folder(tmp_path).read(), uninterrupted)


# ---- failures


def stopped(federation: hs.Federation, tmp_path: Path, rule: hs.methods.Method | None = None) -> Path:
    stop = Stop(after=2)
    go(federation, rule, out=tmp_path, writers=[stop], on_start=stop.start)
    return tmp_path


def test_a_damaged_checkpoint_is_refused(federation: hs.Federation, tmp_path: Path) -> None:
    checkpoint = stopped(federation, tmp_path) / CHECKPOINT
    whole = checkpoint.read_bytes()
    for data in (whole[:-1], whole[:100], b"", b"nonsense" * 100):
        checkpoint.write_bytes(data)
        with pytest.raises(hs.CheckpointError, match="damaged or not a checkpoint") as caught:
            hs.resume(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["model", "rule", "clients", "nothing of it"])
def test_the_checkpoint_of_another_run_is_refused(federation: hs.Federation, tmp_path: Path, what: str) -> None:
    others = {
        "model": lambda: stopped(hs.Federation(hs.tasks.digits(hidden=9), clients=12), tmp_path / "other"),
        "rule": lambda: stopped(federation, tmp_path / "other", hs.methods.Scaffold()),
        "clients": lambda: stopped(hs.Federation(hs.tasks.digits(hidden=8), clients=13), tmp_path / "other"),
        "nothing of it": lambda: (Folder(tmp_path / "other").write(Run("", 0, {}, [], {"w": torch.zeros(2)})), tmp_path / "other")[
            1
        ],
    }
    own = stopped(federation, tmp_path / "own")
    (own / CHECKPOINT).write_bytes((others[what]() / CHECKPOINT).read_bytes())
    with pytest.raises(hs.CheckpointError, match=r"does not belong to this run|client state"):
        hs.resume(own)


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(hs.CheckpointError, match="is not a run folder"):
        hs.resume(tmp_path)


def test_divergence_keeps_the_last_good_round(federation: hs.Federation, tmp_path: Path) -> None:
    """The checkpoint is that of the last round in the history, it can be loaded, and going on fails in the same way."""
    rule = hs.methods.FedAvg(lr=1e15, epochs=2, batch=256)
    with pytest.raises(hs.DivergedError, match=r"client \d+ in round [23] is not finite; lower lr") as caught:
        go(federation, rule, rounds=20, evaluate=0, out=tmp_path)
    run, saved = Folder(tmp_path).read(), Folder(tmp_path).load()
    assert saved is not None and int(saved["counters"][0]) == len(run.history) > 0
    assert all(bool(torch.isfinite(w).all()) for w in run.weights.values())
    assert all(math.isfinite(r["loss"]) for r in run.history)
    with pytest.raises(hs.DivergedError) as again:
        hs.resume(tmp_path)
    assert str(again.value) == str(caught.value)


def test_a_round_that_cannot_be_evaluated_is_not_saved(
    federation: hs.Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights may be finite and yet no good: the last good checkpoint is an earlier one, and history agrees with it."""
    monkeypatch.setattr(experiment, "CHECKPOINT_SECONDS", 0.0)
    state: Tensors = {}

    class Spoil(Stop):
        def write(self, record: Record) -> None:
            assert self.net is not None
            state.update({n: t.clone() for n, t in self.net.state.items()})
            if record["round"] == 3:  # finite weights whose outputs are not
                self.net.executor.method = self.net.method.model_copy(update={"lr": constant(1e35)})

    spoil = Spoil(0)
    with pytest.raises(hs.DivergedError, match="test loss after round 4"):
        go(federation, hs.methods.FedAvg(steps=1), rounds=9, out=tmp_path, writers=[spoil], on_start=spoil.start)
    saved, history = Folder(tmp_path).load(), Folder(tmp_path).history()
    assert saved is not None and len(history) == int(saved["counters"][0]) == 3
    assert torch.equal(saved["state.x"], state["x"])


def test_a_schedule_that_waits_for_something_else_is_an_error(federation: hs.Federation) -> None:
    import asyncio

    async def waits() -> None:
        await asyncio.sleep(0)

    with pytest.raises(hs.HanseError, match="never sends"):
        experiment.drive(waits())


def test_a_saved_run_can_be_resumed(federation: hs.Federation, tmp_path: Path) -> None:
    run = hs.run(federation, hs.methods.Scaffold(), hs.schedules.synchronous(cohort=4), rounds=2)
    run.save(tmp_path)
    again = hs.resume(tmp_path)
    assert again.history == run.history and all(torch.equal(again.weights[n], t) for n, t in run.weights.items())


def test_saving_into_its_own_folder_keeps_the_checkpoint(federation: hs.Federation, tmp_path: Path) -> None:
    run = hs.run(federation, hs.methods.Scaffold(), hs.schedules.synchronous(cohort=4), rounds=2, out=tmp_path)
    before = Folder(tmp_path).load()
    run.save(tmp_path)
    after = Folder(tmp_path).load()
    assert before and after and before.keys() == after.keys() and all(torch.equal(after[n], t) for n, t in before.items())


def test_a_run_is_complete_only_with_a_checkpoint_of_its_last_round(federation: hs.Federation, tmp_path: Path) -> None:
    hs.run(federation, hs.methods.FedAvg(), hs.schedules.synchronous(cohort=4), rounds=2, out=tmp_path)
    assert Folder(tmp_path).complete()
    checkpoint, lines = (tmp_path / CHECKPOINT).read_bytes(), (tmp_path / HISTORY).read_bytes()
    (tmp_path / HISTORY).write_bytes(2 * lines)
    assert not Folder(tmp_path).complete()  # the checkpoint is of an earlier round
    (tmp_path / HISTORY).write_bytes(lines)
    assert Folder(tmp_path).complete()
    (tmp_path / CHECKPOINT).unlink()
    assert not Folder(tmp_path).complete()
    (tmp_path / CHECKPOINT).write_bytes(checkpoint)
    (tmp_path / CLIENTS).unlink()
    assert not Folder(tmp_path).complete()  # it was stopped, rather than over


@pytest.mark.parametrize(("field", "value"), [("rounds", 0), ("evaluate", -1)])
def test_python_calls_are_checked_like_files(federation: hs.Federation, field: str, value: int) -> None:
    with pytest.raises(hs.ConfigError, match=f"{field}: '{value}' is not allowed"):
        hs.run(federation, hs.methods.FedAvg(), **{field: value})  # type: ignore[arg-type]


def test_a_loss_too_large_for_a_float32_sum_is_no_divergence() -> None:
    """Every client's loss is finite; only their weighted sum in float32 would not be."""
    federation = hs.Federation(hs.tasks.quadratics(), clients=10, partition=hs.natural())
    for lr in (3.0, 4.0, 5.0, 6.0, 7.0):
        try:
            run = hs.run(federation, hs.methods.FedAvg(lr=lr, steps=10), hs.schedules.synchronous(10), rounds=3, evaluate=0)
            assert all(math.isfinite(r["loss"]) for r in run.history)
        except hs.DivergedError as error:
            assert "client" in str(error) or "test loss" in str(error) or "model" in str(error)
