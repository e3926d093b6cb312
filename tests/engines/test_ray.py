"""Ray actors: the same bits as in this process with as many shards, whatever becomes of actors and nodes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from same_runs import CASES, FallsOnce, agree, arranged, expected, federation, going

import hanse as hs
from hanse.core.context import Context
from hanse.core.errors import ConfigError, DataError
from hanse.core.messages import Upload

ray = pytest.importorskip("ray")

HOW: dict[str, Any] = {"cpus": 0.1}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Ray on this machine, for all tests of this file."""
    yield
    ray.shutdown()


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_in_this_process(case: str) -> None:
    agree(going(hs.engines.ray(**arranged(case), **HOW), **CASES[case]), expected(case, shards=2))


def test_an_actor_killed_in_the_middle_of_a_round_changes_nothing(tmp_path: Path) -> None:
    flag = tmp_path / "fallen"
    run = going(hs.engines.ray(**arranged("books"), **HOW), method=FallsOnce(flag=str(flag)))
    assert flag.exists()
    agree(run, expected("books", shards=2))


class Refusing(hs.methods.FedAvg):
    """A rule that cannot train."""

    def train(self, ctx: Context) -> Upload:
        raise DataError("client 3: there are no data")


def test_what_a_rule_raises_arrives_as_what_it_is() -> None:
    with pytest.raises(DataError, match="client 3: there are no data"):
        going(hs.engines.ray(**arranged("books"), **HOW), method=Refusing())


def test_an_actor_has_the_data_of_its_own_clients_alone() -> None:
    samples = federation().split.train
    even = samples.some(torch.arange(7) % 2 == 0)
    assert even.counts().tolist() == [n if i % 2 == 0 else 0 for i, n in enumerate(samples.counts().tolist())]
    assert len(even.x) == even.counts().sum()
    for client in (0, 2, 4, 6):
        assert all(one.equal(other) for one, other in zip(even.of(client), samples.of(client), strict=True))


def test_shards_are_as_many_as_actors() -> None:
    assert hs.engines.ray(workers=3).shards == 3
    with pytest.raises(ConfigError, match=r"ray\.shards: 2 is not allowed: each of the 3 actors has one"):
        hs.engines.ray(workers=3, shards=2)


class Waiting(hs.methods.Scaffold):
    """A rule that takes its time in the third round, for as long as something is about to happen."""

    flag: str
    """A file that says that it has happened."""

    def train(self, ctx: Context) -> Upload:
        upload = super().train(ctx)
        if bool((ctx.rounds == 2).any()) and not Path(self.flag).exists():
            Path(f"{self.flag}.due").touch()
            while not Path(self.flag).exists():
                time.sleep(0.05)
        return upload


def test_a_node_killed_in_the_middle_of_a_round_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    ray.shutdown()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    flag = tmp_path / "gone"
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": soon})
    try:
        cluster.add_node(num_cpus=2)
        lost = cluster.add_node(num_cpus=2)

        def kill() -> None:
            while not Path(f"{flag}.due").exists():
                time.sleep(0.05)
            cluster.remove_node(lost, allow_graceful=False)
            flag.touch()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        engine = hs.engines.ray(**arranged("books"), cpus=1, address=cluster.address)
        run = going(engine, method=Waiting(flag=str(flag)))
    finally:
        ray.shutdown()
        cluster.shutdown()
    agree(run, expected("books", shards=2))
