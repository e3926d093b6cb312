"""Processes that are killed, started, reused and gone: the same bits, and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from means import SIZE, mean, until, updates

from hanse.core.errors import TransportError
from hanse.hierarchy.service import Aggregation


def test_a_killed_aggregator_is_replaced_and_its_inputs_added_again() -> None:
    x, weights = updates(8)
    with Aggregation(SIZE, workers=2, fan_in=4) as service:
        whole = mean(service, x, weights)
        round, starts = service.round(8), service.counters.starts
        for i in range(8):
            if i in (2, 7):
                task = round._places[i][0]
                assert task.worker is not None
                os.kill(task.worker.process.pid, signal.SIGKILL)
                until(lambda task=task: service.pump(0) or task.attempts > 0)
            round.put(x[i], weights[i])
        found, _ = round.finish()
        assert torch.equal(found, whole)
        assert service.counters.redone == 2 and service.counters.starts > starts and service.needed == 0
        left = [shelf.folder for node in service.nodes for shelf in node.store.shelves]
        assert all(folder.exists() for folder in left)
    assert not any(folder.exists() for folder in left)


def test_a_killed_sender_sends_again() -> None:
    x, weights = updates(4)
    with Aggregation(SIZE, nodes=2, workers=1, fan_in=2, capacity=2) as service:
        whole = mean(service, x, weights)
        round = service.round(4)
        for i in range(4):
            round.put(x[i], weights[i])
        for pid in service.aggregators:
            os.kill(pid, signal.SIGKILL)
        found, _ = round.finish()
        assert torch.equal(found, whole) and service.counters.redone >= 1 and service.needed == 0


def test_what_kills_every_aggregator_ends_the_round_and_not_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = updates(3)
    with Aggregation(SIZE, workers=1) as service:
        one = mean(service, x, weights)
        for program, error in (
            ("/bin/false", "3 have ended over the same task, the last with 1"),
            ("/nowhere", "/nowhere cannot be"),
        ):
            round = service.round(4)
            (pid,) = service.aggregators
            os.kill(pid, signal.SIGKILL)
            with monkeypatch.context() as patched:
                patched.setattr(sys, "executable", program)
                with pytest.raises(TransportError, match=error):
                    for row in x:
                        round.put(row)
                    round.finish()
                if not round.closed:
                    with pytest.raises(TransportError, match="aggregators: "):
                        round.finish()
            assert service.needed == 0 and torch.equal(mean(service, x, weights), one)


def test_ctrl_c_is_for_the_server_alone() -> None:
    interrupted = """
import os, signal, torch
from hanse.hierarchy.service import Aggregation
signal.signal(signal.SIGINT, lambda *_: None)
with Aggregation(1000, workers=1) as service:
    round = service.round(2)
    round.put(torch.ones(1000))
    os.killpg(0, signal.SIGINT)  # as from a terminal, while the aggregator starts
    round.put(torch.ones(1000))
    round.finish()
    print(service.counters.redone)
"""
    done = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True, process_group=0)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_a_killed_server_leaves_neither_processes_nor_memory() -> None:
    killed = """
import os, signal, torch
from hanse.hierarchy.service import Aggregation
service = Aggregation(1000)
round = service.round(4)
round.put(torch.ones(1000))
print(*service.aggregators, *(shelf.folder for shelf in service.nodes[0].store.shelves), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    pid, *left = subprocess.run([sys.executable, "-c", killed], stdout=subprocess.PIPE, text=True).stdout.split()
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    with Aggregation(SIZE):
        assert not any(Path(folder).exists() for folder in left)


def test_in_steady_load_nothing_is_started_after_the_first_round() -> None:
    x, weights = updates(12)
    with Aggregation(SIZE, nodes=2, workers=2, fan_in=2, capacity=8, idle=60) as service:
        mean(service, x, weights)
        first, promoted = service.counters.starts, service.counters.promotions
        for _ in range(5):
            mean(service, x, weights)
        assert service.counters.starts == first <= 4
        assert service.counters.promotions > promoted and service.counters.redone == 0


def test_idle_aggregators_end_and_come_back() -> None:
    x, weights = updates(3)
    with Aggregation(SIZE, workers=1, idle=0.05) as service:
        one = mean(service, x, weights)
        (worker,) = service.nodes[0].workers
        until(lambda: worker.process.poll() is not None)
        assert torch.equal(mean(service, x, weights), one)
        assert service.counters.starts == 2 and service.counters.node_seconds > 0


def test_aggregators_are_warm_when_a_round_begins_and_the_estimate_asks_for_them() -> None:
    x, weights = updates(4)
    with Aggregation(SIZE, workers=2) as service:
        mean(service, x, weights)
        assert service.nodes[0].queue is not None and service.nodes[0].queue > 0
        service.nodes[0].queue = 8.0
        for worker in service.nodes[0].workers:  # as if they had been idle for long
            worker.process.kill()
            worker.process.wait()
        service.round(4)
        assert len(service.aggregators) == 2
        assert all(worker.process.poll() is None for worker in service.nodes[0].workers)


def test_aggregators_let_go_of_results_that_were_given_out() -> None:
    x, weights = updates(5)
    with Aggregation(SIZE, workers=1) as service:
        for _ in range(4):
            mean(service, x, weights)
        (pid,) = service.aggregators
        maps = Path(f"/proc/{pid}/maps")
        until(lambda: not any("hanse-" in line and "(deleted)" in line for line in maps.read_text().splitlines()))
