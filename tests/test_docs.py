"""What the README and CONTRIBUTING show runs as it is written, each in a process and a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    """The Python code blocks of a page of the repository."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def python(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "HANSE_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readme_example_prints_a_line_a_codec_and_draws_a_picture(tmp_path: Path) -> None:
    printed = python("-c", blocks("README.md")[0], cwd=tmp_path).splitlines()
    found = [re.fullmatch(r"(\w+).*: accuracy (0\.\d+), (\d+\.\d) MB up", line) for line in printed]
    assert all(found), printed
    (full, accuracy, megabytes), (sparse, _, fewer) = [match.groups() for match in found if match]
    assert (full, sparse) == ("identity", "topk")
    assert float(accuracy) > 0.8
    assert float(fewer) < 0.25 * float(megabytes)  # a tenth of the values, with their places
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_the_readme_rule_is_fedprox(tmp_path: Path) -> None:
    compare = """
import hanse as hs, torch
fed = hs.Federation(hs.tasks.digits(hidden=8), clients=6, dtype="float64")
engine = hs.engines.local(path="stacked", chunk=6, workers=1, threads=1)
ends = [
    hs.run(fed, rule, hs.schedules.synchronous(cohort=6), rounds=2, evaluate=0, engine=engine).weights
    for rule in (Proximal(mu=0.1, epochs=2), hs.methods.FedProx(mu=0.1, epochs=2), hs.methods.FedAvg(epochs=2))
]
print(*(all(torch.equal(ends[0][n], other[n]) for n in ends[0]) for other in ends[1:]))
"""
    assert python("-c", blocks("README.md")[1] + compare, cwd=tmp_path).split() == ["True", "False"]


def test_the_rule_of_contributing_passes_its_own_tests(tmp_path: Path) -> None:
    rule, tests = blocks("CONTRIBUTING.md")
    (tmp_path / "fednova.py").write_text(rule)
    (tmp_path / "test_fednova.py").write_text(tests)
    (tmp_path / "conftest.py").write_text(f"import hanse.methods\nhanse.methods.__path__.append({str(tmp_path)!r})\n")
    assert "3 passed" in python(
        "-m", "pytest", "--rootdir", str(tmp_path), "-q", "-p", "no:cacheprovider", str(tmp_path), cwd=tmp_path
    )
    assert len(rule.splitlines()) < 60


def test_the_task_of_the_quick_start_is_learned(tmp_path: Path) -> None:
    assert float(python("-c", blocks("docs/index.md")[0], cwd=tmp_path)) > 0.9


def test_the_plain_pytorch_rule_of_the_docs_trains(tmp_path: Path) -> None:
    run = """
import hanse as hs
fed = hs.Federation(hs.tasks.digits(), clients=10)
run = hs.run(fed, TwoOptimisers(lr=0.1), hs.schedules.synchronous(cohort=5), rounds=5, evaluate=0)
print(run.history[-1]["metrics"]["accuracy"])
"""
    assert float(python("-c", blocks("docs/writing-a-method.md")[0] + run, cwd=tmp_path)) > 0.5


def test_the_peers_of_the_docs_learn_from_each_other(tmp_path: Path) -> None:
    run = """
import hanse as hs
fed = hs.Federation(hs.tasks.digits(hidden=16), clients=8, partition=hs.shards(4), fleet=hs.fleet.phones())
run = hs.run(fed, hs.methods.FedAvg(lr=0.3, batch=8), whisper(), rounds=60, evaluate=0)
print(run.history[-1]["metrics"]["node_accuracy"])
"""
    assert float(python("-c", blocks("docs/peers.md")[0] + run, cwd=tmp_path)) > 0.6


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(page: str) -> None:
    links = re.findall(r"(?:\]\(|src=\")(?!https?:|#)([^)#\"]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
