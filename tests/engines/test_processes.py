"""Worker processes: the same bits as in this process, whatever becomes of them."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from same_runs import CASES, FallsOnce, agree, arranged, expected, federation, going

import hanse as hs
from hanse.core.context import Context
from hanse.core.errors import DataError, TransportError
from hanse.core.messages import Upload
from hanse.engines.processes import POOL, Processes
from hanse.engines.simulation import Simulation


class Refusing(hs.methods.FedAvg):
    """A rule whose client 3 has nothing to train on."""

    def train(self, ctx: Context) -> Upload:
        if bool((ctx.ids == 3).any()):
            raise DataError("client 3: there are no data")
        return super().train(ctx)


class Fatal(hs.methods.FedAvg):
    """A rule that ends the process it runs in."""

    def train(self, ctx: Context) -> Upload:
        os._exit(7)


class Wrong(hs.methods.FedAvg):
    """A rule with a mistake in it."""

    def train(self, ctx: Context) -> Upload:
        return ctx.nothing  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_in_this_process(case: str) -> None:
    agree(going(hs.engines.processes(**arranged(case)), **CASES[case]), expected(case))


def test_the_same_bits_with_shards() -> None:
    case = "books, without a barrier"
    agree(going(hs.engines.processes(**arranged(case, shards=3)), **CASES[case]), expected(case, shards=3))


def test_an_open_arrangement_is_chosen_and_noted() -> None:
    run = going(hs.engines.processes(workers=2))
    assert hs.engines.Engine.parse(run.notes["arrangement"]) == hs.engines.processes.parse(run.notes["arrangement"])
    agree(run, going(hs.engines.Engine.parse(run.notes["arrangement"])))


def hands(net: Simulation) -> Processes:
    return net.crew.hands  # type: ignore[attr-defined, no-any-return]


class Meddler:
    """Does something to the first worker after the first round."""

    def __init__(self, deed: Callable[[Processes], Any]) -> None:
        self.deed, self.done, self.replaced = deed, False, 0

    def start(self, net: Simulation) -> None:
        self.net = net

    def write(self, record: Any) -> None:
        if not self.done:
            self.done = True
            self.deed(hands(self.net))
        self.replaced = self.net.failures()["replaced"]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_lost_is_replaced_and_its_clients_run_again(what: signal.Signals, caplog: Any) -> None:
    case = "books, without a barrier"
    meddler = Meddler(lambda hands: os.kill(hands.workers[0].process.pid or 0, what))
    engine = hs.engines.processes(**arranged(case), patience=1)
    agree(going(engine, **CASES[case], writers=[meddler], on_start=meddler.start), expected(case))
    assert meddler.replaced == 1
    lost = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lost) == 1 and "another one takes its place" in lost[0].getMessage()


def test_a_worker_killed_in_the_middle_of_a_round_changes_nothing(tmp_path: Path) -> None:
    flag = tmp_path / "fallen"
    run = going(hs.engines.processes(**arranged("books")), method=FallsOnce(flag=str(flag)))
    assert flag.exists()
    agree(run, expected("books"))


def test_what_a_rule_raises_arrives_as_what_it_is() -> None:
    with pytest.raises(DataError, match="client 3: there are no data"):
        going(hs.engines.processes(**arranged("a plain mean")), method=Refusing(), schedule=hs.schedules.synchronous(cohort=7))
    with pytest.raises(RuntimeError, match="has no attribute 'nothing'"):
        going(hs.engines.processes(**arranged("a plain mean")), method=Wrong())
    agree(going(hs.engines.processes(**arranged("a plain mean"))), expected("a plain mean"))


def test_clients_that_end_every_worker_end_the_run() -> None:
    with pytest.raises(TransportError, match="3 workers were lost with the same clients"):
        going(hs.engines.processes(**arranged("a plain mean", workers=1)), method=Fatal())


def test_blocks_are_used_again(tmp_path: Path) -> None:
    """Also those whose results outlive the next request, as states and pending replies do."""
    counts: list[int] = []

    class Counter(Meddler):
        def write(self, record: Any) -> None:
            folders = {Path(name).parent for worker in hands(self.net).workers for name in worker.mapped}
            counts.append(max(len([*folder.iterdir()]) for folder in folders))

    meddler = Counter(lambda hands: None)
    engine = hs.engines.processes(**arranged("books", workers=1))
    schedule = hs.schedules.synchronous(cohort=5)
    hs.run(federation(), hs.methods.Scaffold(), schedule, rounds=20, engine=engine, writers=[meddler], on_start=meddler.start)
    assert len(counts) == 20 and counts[-1] == counts[5] < 8


def test_nothing_stays_in_shared_memory() -> None:
    """Neither of the run's own blocks, nor of the workers', once these have ended."""
    folders: list[Path] = []

    def note(hands: Processes) -> None:
        workers = [attached for worker in hands.workers for attached in worker.mapped]
        folders.extend([hands.blocks.folder, *(Path(name).parent for name in workers), *(w.blocks.folder for w in hands.workers)])

    meddler, case = Meddler(note), "books"
    going(hs.engines.processes(**arranged(case)), **CASES[case], writers=[meddler], on_start=meddler.start)
    POOL.close()
    assert len(folders) >= 5
    assert [folder for folder in folders if folder.exists()] == []
