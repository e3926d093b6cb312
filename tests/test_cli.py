"""The command line: what it runs, prints and refuses."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Outcome, hanse, refused

import hanse as hs
from hanse.cli import KINDS
from hanse.track.folder import CHECKPOINT, HISTORY, Folder

Hanse = Callable[..., Outcome]
SMALL = ["--task", "digits(hidden=4)", "--clients", 6, "--cohort", 3, "--rounds", 3, "--engine", 'local("stacked", 3, 1, 1)']


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hanse:
    """``cli(*arguments)`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: hanse(capsys, *arguments)


def pure(text: str) -> object:
    """JSON as the standard has it: no NaN, no infinity, nothing around it."""

    def never(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=never)


# ---- running


@pytest.mark.parametrize(
    "flags",
    [
        ["--codec", "topk", "--codec", "sign"],
        ["--schedule", "synchronous", "--schedule", "fedbuff"],
        ["--seed", "1", "--seed", "2"],
        ["--seed", "1,2"],
    ],
)
def test_what_is_given_twice_is_compared(cli: Hanse, flags: list[str]) -> None:
    assert "estimate for 2 runs" in "".join(cli("run", *SMALL, *flags, "--dry-run")[1:])


def test_flags_toml_and_python_give_the_same_run(cli: Hanse, tmp_path: Path) -> None:
    flags = [
        "--partition",
        "dirichlet(0.5)",
        "--method",
        "Scaffold(lr=0.2)",
        "--codec",
        "topk(0.5)",
        "--seed",
        3,
        "--dtype",
        "float64",
    ]
    (tmp_path / "same.toml").write_text(
        'task = "digits(hidden=4)"\nclients = 6\ncohort = 3\nrounds = 3\nengine = "local(\'stacked\', 3, 1, 1)"\n'
        'partition = "dirichlet(0.5)"\nmethod = "Scaffold(lr=0.2)"\ncodec = "topk(0.5)"\nseed = 3\ndtype = "float64"\n'
    )
    assert cli("run", *SMALL, *flags).status == 0
    assert cli("run", "same.toml").status == 0
    one, other = Folder(tmp_path / "runs/run/scaffold-seed3").read(), Folder(tmp_path / "runs/same/scaffold-seed3").read()
    federation = hs.Federation(hs.tasks.digits(4), 6, hs.dirichlet(0.5), seed=3, dtype="float64")
    third = hs.run(
        federation, hs.methods.Scaffold(lr=0.2), hs.schedules.synchronous(3), rounds=3, codec=hs.codecs.topk(0.5),
        engine=hs.engines.local("stacked", 3, 1, 1),
    )  # fmt: skip
    assert one.history == other.history == third.history and one.settings == other.settings == third.settings
    assert all(torch.equal(one.weights[n], w) and torch.equal(other.weights[n], w) for n, w in third.weights.items())


def test_flags_override_the_file(cli: Hanse, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('task = "digits(hidden=4)"\nclients = 6\ncohort = 3\nrounds = 50\n')
    assert cli("run", "a.toml", "--rounds", 2, "--out", "here").status == 0
    assert len(Folder(tmp_path / "here/fedavg-seed0").history()) == 2


def test_json_on_stdout_and_progress_on_stderr(cli: Hanse) -> None:
    outcome = cli("run", *SMALL, "--json", "--method", "FedAvg", "--method", "FedProx")
    rows = pure(outcome.out)
    assert outcome.status == 0 and isinstance(rows, list) and [row["method"] for row in rows] == ["FedAvg", "FedProx"]
    assert "estimate for 2 runs of 3 rounds" in outcome.err and "round 3/3" in outcome.err and "report: " in outcome.err
    assert "\x1b" not in outcome.err


def test_a_table_for_people(cli: Hanse, tmp_path: Path) -> None:
    outcome = cli("run", *SMALL, "--method", "FedAvg", "--method", "FedProx")
    assert outcome.status == 0 and "FedAvg" in outcome.out and "FedProx" in outcome.out and "ccuracy" in outcome.out
    assert (tmp_path / "runs/run/report.html").stat().st_size > 1000 and list((tmp_path / "runs/run").glob("figures/*.png"))


def test_a_dry_run_trains_nothing_and_knows_the_bytes(cli: Hanse, tmp_path: Path) -> None:
    flags = [*SMALL, "--fleet", "phones", "--method", "FedAvg", "--method", "Scaffold", "--seed", "0 1"]
    expected = pure(cli("run", *flags, "--dry-run", "--json").out)
    assert list(tmp_path.iterdir()) == [] and isinstance(expected, dict)
    words = cli("run", *flags, "--dry-run")
    assert words.status == 0 and words.out.startswith("estimate for 4 runs of 3 rounds: ") and list(tmp_path.iterdir()) == []
    assert cli("run", *flags).status == 0
    last = [Folder(p).history()[-1] for p in (tmp_path / "runs/run").glob("*-seed?")]
    assert len(last) == 4
    for estimated, field in (("down", "bytes_down"), ("up", "bytes_up")):
        assert expected[estimated] == pytest.approx(sum(r[field] for r in last), rel=0.01)  # type: ignore[literal-required]


def test_report_compares_folders(cli: Hanse, tmp_path: Path) -> None:
    cli("run", *SMALL, "--out", "one")
    cli("run", *SMALL, "--out", "two", "--method", "Scaffold", "--method", "FedProx")
    outcome = cli("report", "one", "two", "--out", "both", "--json")
    rows = pure(outcome.out)
    assert outcome.status == 0 and isinstance(rows, list) and {row["method"] for row in rows} == {"FedAvg", "FedProx", "Scaffold"}
    assert (tmp_path / "both/report.html").is_file() and "report: both/report.html" in outcome.err
    assert cli("report", "two/scaffold-seed0").status == 0


def test_resume_a_finished_study_and_a_single_run(cli: Hanse, tmp_path: Path) -> None:
    cli("run", *SMALL, "--out", "one")
    before = Folder(tmp_path / "one/fedavg-seed0").read()
    assert cli("resume", "one").status == 0
    assert cli("resume", "one/fedavg-seed0").status == 0
    hs.run(hs.Federation(hs.tasks.digits(4), 6), hs.methods.FedAvg(), rounds=1, schedule=hs.schedules.synchronous(3), out="python")
    assert cli("resume", "python").status == 0
    assert Folder(tmp_path / "one/fedavg-seed0").read().history == before.history


def test_privacy_by_flags_and_by_file(cli: Hanse, tmp_path: Path) -> None:
    """A flag for each kind; the progress line and the table say what it cost; an empty flag overrides the file."""
    file = tmp_path / "a.toml"
    file.write_text('privacy = ["differential(noise=2.0)", "secure"]\n')
    flags = [*SMALL, "--method", "FedAvg(weights='uniform')"]
    one = cli("run", *flags, "--privacy", "differential(noise=2.0)", "--privacy", "secure", "--out", "one")
    two = cli("run", file, *flags, "--out", "two", "--json")
    cli("run", file, *flags, "--privacy", "", "--out", "open")
    histories = [Folder(tmp_path / name / "fedavg-seed0").read().history for name in ("one", "two", "open")]
    assert histories[0] == histories[1] and "epsilon" not in histories[2][-1]
    (row,) = pure(two.out)  # type: ignore[misc]
    assert row["epsilon"] == histories[0][-1]["epsilon"] > 0
    assert "epsilon" in one.out and "epsilon" in one.err
    assert (tmp_path / "one/figures/epsilon-rounds.png").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_list_every_kind(cli: Hanse, kind: str) -> None:
    rows = pure(cli("list", kind, "--json").out)
    assert isinstance(rows, list) and rows
    for row in rows:
        named = {"slug", "name", "paper", "status", "shown"} if kind == "systems" else {"name", "text", "fields"}
        assert named <= row.keys() and row["name"]
        assert all(f["text"] for f in row.get("fields", [])), row["name"]
    words = cli("list", kind).out
    assert all(row.get("slug", row["name"]) in words for row in rows)


def test_help_explains_every_setting(cli: Hanse) -> None:
    from hanse.config import Settings

    text = " ".join(cli("run", "--help").out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text and str(field.description).split(",")[0].split(".")[0] in text
    assert cli("--version").out.strip() == hs.__version__


def test_help_does_not_import_torch() -> None:
    code = "import atexit, sys; from hanse.cli import main; atexit.register(lambda: print('torch' in sys.modules)); main()"
    out = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[-1] == "False" and any("resume" in line for line in out)


# ---- what is refused: one line on stderr, status 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--method", "FedAvgg"], ["method: unknown name 'FedAvgg'", "did you mean FedAvg"]),
        (["run", "--method", "FedAvg(lr=-1)"], ["-1 is not allowed", "greater than 0"]),
        (["run", "--method", "FedAvg(("], ["method: cannot read"]),
        (["run", "--partition", "dirichlet(0)"], ["dirichlet.alpha: 0 is not allowed", "greater than 0"]),
        (["run", "--partition", "dirichlet(-0.1)"], ["dirichlet.alpha: -0.1 is not allowed"]),
        (["run", "--clients", "5", "--cohort", "6"], ["cohort: 6 is not allowed", "number of clients, 5"]),
        (["run", "--clients", "5", "--schedule", "synchronous(cohort=6)"], ["cohort: 6 is not allowed", "number of clients, 5"]),
        (["run", "--clients", "5"], ["cohort: 10 is not allowed", "number of clients, 5"]),
        (["run", "--clients", "9999"], ["clients: 9999", "is not allowed", "1437 training samples"]),
        (["run", "--clients", "x"], ["clients: 'x' is not allowed"]),
        (["run", "--private", "tail.*"], ["'tail.*' matches no tensor"]),
        (["run", "--frozen", "*"], ["frozen", "no trainable parameter"]),
        (["run", "--engine", 'local(path="loops")'], ["local.path: 'loops' is not allowed"]),
        (["run", "--engine", 'local(path="stacked", precision="bf16")'], ["local.path: 'stacked' is not allowed"]),
        (["run", "--device", "abacus"], ["device: 'abacus' is not allowed"]),
        (["run", "--task", "table(path='none.csv', label='y')"], ["none.csv"]),
        (["run", "none.toml"], ["none.toml: cannot be read"]),
        (["run", "--nonsense", "1"], ["--nonsense"]),
        (["run", "--rounds"], ["--rounds"]),
        (["nonsense"], ["nonsense"]),
        (["resume"], ["folder"]),
        (["list", "method"], ["kind: unknown name 'method'", "did you mean methods"]),
        (["list"], ["kind"]),
        (["reproduce", "nothing"], ["unknown name 'nothing'"]),
        (["bench", "W9"], ["W9"]),
    ],
    ids=lambda v: " ".join(map(str, v))[:40] if isinstance(v, list) else None,
)
def test_bad_input_is_one_line(cli: Hanse, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    refused(cli(*arguments), 2, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clients = ", ["a.toml: not a TOML file"]),
        ("[method]\nlr = 1\n", ["method.0: {'lr': 1} is not allowed"]),
        ("roundes = 3\n", ["setting: unknown name 'roundes'", "did you mean rounds"]),
        ("private = [1]\n", ["private.0: 1 is not allowed"]),
    ],
)
def test_a_bad_file_is_one_line(cli: Hanse, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "a.toml").write_text(text)
    refused(cli("run", "a.toml"), 2, *words)


def test_labels_out_of_range(cli: Hanse, tmp_path: Path) -> None:
    x, y = np.zeros((40, 8, 8), dtype=np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "a.npz", x=x, y=y - 1)
    refused(cli("run", "--task", "images('a.npz')", "--clients", 4, "--cohort", 2), 2, "label -1 in row 0 is not allowed")


def test_a_client_without_data(cli: Hanse, tmp_path: Path) -> None:
    outcome = cli("run", "--partition", "natural", "--task", "quadratics", "--clients", 11)
    refused(outcome, 2, "clients: 11")


# ---- failures: one line on stderr, status 2


def failed(outcome: Outcome, *words: str) -> None:
    """Work had begun, so stderr tells of it; its last line is the error."""
    last = outcome.err.splitlines()[-1]
    assert outcome.status == 2 and last.startswith("hanse: ") and "Traceback" not in outcome.err, outcome
    assert all(word in last for word in words), last


def test_no_run_to_resume_or_report(cli: Hanse) -> None:
    refused(cli("resume", "nowhere"), 2, "nowhere holds no run")
    refused(cli("report", "nowhere"), 2, "nowhere holds no run")


def test_a_folder_that_cannot_be_written(cli: Hanse, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed(cli("run", *SMALL, "--out", "file/below"), "out: file/below cannot be written: Not a directory")
    cli("run", *SMALL, "--out", "one")
    failed(cli("report", "one", "--out", "file/below"), "file/below", "Not a directory")


@pytest.mark.parametrize("limit", [500, 5_000, 40_000], ids=["settings", "checkpoint", "report"])
def test_a_full_disk(cli: Hanse, limit: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        outcome = cli("run", *SMALL, "--rounds", 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    failed(outcome, "cannot be written: File too large")


def test_divergence_and_what_is_left(cli: Hanse, tmp_path: Path) -> None:
    flags = ["--task", "quadratics", "--clients", 10, "--cohort", 3, "--method", "FedAvg(lr=1000, steps=1)", "--evaluate", 0]
    first = cli("run", *flags)
    failed(first, "training loss of client", "is not finite; lower lr")
    saved = Folder(tmp_path / "runs/run/fedavg-seed0").load()
    assert saved is not None and 1 < int(saved["counters"][0]) < 20 and bool(torch.isfinite(saved["state.x"]).all())
    again = cli("resume", "runs/run")
    failed(again)
    assert again.err.splitlines()[-1] == first.err.splitlines()[-1]


def test_a_damaged_checkpoint(cli: Hanse, tmp_path: Path) -> None:
    cli("run", *SMALL)
    folder = tmp_path / "runs/run/fedavg-seed0"
    whole = (folder / CHECKPOINT).read_bytes()
    (folder / CHECKPOINT).write_bytes(whole[:-10])
    failed(cli("resume", "runs/run"), str(CHECKPOINT), "damaged or not a checkpoint")
    refused(cli("report", "runs/run"), 2, "damaged or not a checkpoint")


# ---- Ctrl-C


def test_ctrl_c_saves_and_says_how_to_go_on(cli: Hanse, tmp_path: Path) -> None:
    flags = [*SMALL, "--rounds", 250, "--method", "FedAvg", "--method", "Scaffold"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from hanse.cli import main; main()", "run", *map(str, flags), "--out", "stopped"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    history = tmp_path / "stopped/fedavg-seed0" / HISTORY
    while process.poll() is None and not (history.is_file() and history.read_bytes().count(b"\n") > 3):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err, err
    assert err.splitlines()[-1] == "stopped, state saved; go on with: hanse resume stopped"
    saved, lines = Folder(history.parent).load(), Folder(history.parent).history()
    assert saved is not None and 3 < int(saved["counters"][0]) == len(lines) < 250
    assert cli("resume", "stopped").status == 0
    assert cli("run", *flags, "--out", "whole").status == 0
    for name in ("fedavg-seed0", "scaffold-seed0"):
        one, other = Folder(tmp_path / "stopped" / name).read(), Folder(tmp_path / "whole" / name).read()
        assert one.history == other.history
        assert all(torch.equal(one.weights[n], w) for n, w in other.weights.items())


def test_numbers_without_meaning_are_null_in_json(cli: Hanse, tmp_path: Path) -> None:
    """With this seed nobody takes part, so there is no loss to tell."""
    flags = ["--schedule", "synchronous(cohort=1, draw='bernoulli')", "--task", "quadratics", "--clients", 10, "--rounds", 1]
    outcome = cli("run", *flags, "--seed", 1, "--json")
    rows = pure(outcome.out)
    assert outcome.status == 0 and isinstance(rows, list)
    assert Folder(tmp_path / "runs/run/fedavg-seed1").history()[0]["cohort"] == []
